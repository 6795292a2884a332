"""A file for `speechalign compare`: several runs of one recipe, and one table of all."""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, model_validator

from speechalign.config.base import Config

NAME_PATTERN = r"^[a-z0-9-]+$"
"""Of a step, which becomes a folder."""


class ArmConfig(Config):
    """A run of the recipe with other settings: `RUN/NAME`, or `RUN/NAME-seed1` and so on."""

    kind: Literal["arm"] = "arm"
    name: str = Field(pattern=NAME_PATTERN)
    label: str
    """In the table."""
    overrides: dict[str, Any] = Field(default_factory=dict[str, Any])
    """Dotted keys of the recipe. `{run}` in a text stands for the comparison's own folder."""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    """Of the sampling and the training; the held-out prompts and their luck stay."""
    until: Literal["pairs", "report"] = "report"
    """`pairs`: only makes data for another step, and has no row."""


class RewardModelStepConfig(Config):
    """A reward model that later steps use: `RUN/NAME`."""

    kind: Literal["reward_model"] = "reward_model"
    name: str = Field(pattern=NAME_PATTERN)
    recipe: Path
    overrides: dict[str, Any] = Field(default_factory=dict[str, Any])


StepConfig: TypeAlias = Annotated[ArmConfig | RewardModelStepConfig, Field(discriminator="kind")]


class CompareConfig(Config):
    """Steps in the order in which they run."""

    run_dir: Path
    recipe: Path
    """Of `speechalign align`; every arm starts from it."""
    overrides: dict[str, Any] = Field(default_factory=dict[str, Any])
    """For every arm, before its own."""
    steps: tuple[StepConfig, ...] = Field(min_length=1)
    reward_model: str | None = None
    """The step whose reward model is asked which of two answers is better."""
    num_resamples: int = Field(default=1000, gt=0)

    @model_validator(mode="after")
    def _names_are_known(self) -> "CompareConfig":
        names = [step.name for step in self.steps]
        if len(set(names)) < len(names):
            raise ValueError(f"two steps have the same name: {', '.join(sorted(names))}")
        models = [s.name for s in self.steps if isinstance(s, RewardModelStepConfig)]
        if self.reward_model is not None and self.reward_model not in models:
            raise ValueError(
                f"reward_model {self.reward_model!r} is no reward model step of this file; there "
                f"are {', '.join(models) or 'none'}"
            )
        return self
