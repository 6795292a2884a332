"""Align speech codec language models with preferences, on a Ray cluster."""

__version__ = "0.1.0"
