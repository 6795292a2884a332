"""A policy behind an HTTP endpoint that speaks as OpenAI's does."""
