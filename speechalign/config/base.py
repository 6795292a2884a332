"""The base of every config.

A config is complete, frozen and checked before any actor starts; a default lives on its field
and nowhere else.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Config(BaseModel):
    """Unknown keys are errors, values never change.

    A section that is given in part keeps what the field's default says of the rest: to set one key
    of `EngineConfig(learning_rate=3e-5)` does not change the learning rate.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _keep_the_rest_of_defaults(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        merged: dict[str, Any] = dict(values)
        for name, field in cls.model_fields.items():
            default, given = field.default, merged.get(name)
            if isinstance(default, Config) and isinstance(given, Mapping):
                kind = getattr(default, "kind", None)
                if given.get("kind", kind) == kind:  # of another kind it is another section
                    merged[name] = default.model_dump(exclude_unset=True) | dict(given)
        return merged
