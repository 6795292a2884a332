"""When an iteration counts as worse than the best one before it."""

from pydantic import Field

from speechalign.config.base import Config


class GuardsConfig(Config):
    """Limits on what an iteration may lose against the best one before it, on held-out prompts.

    A limit is on the paired difference; null takes the guard away. A metric that no judge of the
    evaluation measures is not guarded.
    """

    stop_when_worse: bool = False
    """Stop the run after an iteration beyond a limit. Such an iteration is never the best one,
    whether the run stops or not."""
    interval_excludes_zero: bool = True
    """A limit counts only where the 95 % interval of the difference excludes 0."""
    max_wer_rise: float | None = Field(default=0.02, ge=0)
    """Absolute: 0.02 is two words in a hundred."""
    max_speaker_similarity_drop: float | None = Field(default=0.02, ge=0)
    max_distillmos_drop: float | None = Field(default=0.1, ge=0)
    max_stop_rate_drop: float | None = Field(default=0.05, ge=0)
    """Of the share of samples that end by themselves."""
    max_duration_error_rise: float | None = Field(default=0.1, ge=0)
    """Of the mean distance of a clip's duration ratio from 1."""
    max_silence_rise: float | None = Field(default=0.1, ge=0)
    """Of the share of a clip that is silent."""
