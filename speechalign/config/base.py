"""The base of every config.

A config is complete, frozen and checked before any actor starts; a default lives on its field
and nowhere else.
"""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Unknown keys are errors, values never change."""

    model_config = ConfigDict(frozen=True, extra="forbid")
