"""What a run can be told: frozen pydantic models, one module a concern, no torch."""
