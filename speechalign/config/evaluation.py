"""How a policy is measured."""

from pydantic import Field

from speechalign.config.base import Config
from speechalign.config.judges import (
    DistillMosConfig,
    DnsMosConfig,
    JudgeConfig,
    RecogniserConfig,
    SignalConfig,
    SpeakerConfig,
)
from speechalign.config.sampling import PromptsConfig, Temperature


class EvaluationConfig(Config):
    """Held-out prompts, and judges with at least one measure that makes no reward."""

    seed: int = 0
    """Of the choice of prompts and of what is sampled: not the run's, so that runs compare."""
    prompts: PromptsConfig = PromptsConfig(split="heldout", num_prompts=200)
    temperature: Temperature = 1.0
    """1 is the policy itself; below 1 every policy is heard sharper than it is."""
    judges: tuple[JudgeConfig, ...] = (
        RecogniserConfig(model="base", role="eval"),
        SpeakerConfig(),
        DistillMosConfig(),
        DnsMosConfig(),
        SignalConfig(),
    )
    best_of: int = Field(default=1, gt=0)
    """Samples of a prompt, of which the reward picks the one that the judges hear."""
    num_ceiling_prompts: int = Field(default=100, gt=0)
    """Of the held-out prompts, those whose recordings measure the ceiling."""
    num_resamples: int = Field(default=1000, gt=0)
    """Of the bootstrap."""
    num_players: int = Field(default=8, gt=0)
    """Prompts whose sound is in the report."""
