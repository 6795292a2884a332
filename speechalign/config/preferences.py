"""How judged samples become pairs."""

from typing import Literal

from pydantic import Field, FiniteFloat, model_validator

from speechalign.config.base import Config
from speechalign.types import PairKind


class PairingConfig(Config):
    """Which pairs are made of a group of samples."""

    kinds: tuple[Literal[PairKind.GOLDEN, PairKind.RANKED, PairKind.LABELLED], ...] = Field(
        default=(PairKind.RANKED,), min_length=1
    )
    """golden: the recording against a sample, the paper's pairs. ranked: best against worst.
    labelled: every sample alone, good or bad by its reward, for KTO."""
    min_margin: float = Field(default=0.1, gt=0)
    """Of the rewards of a ranked pair; below it the samples are tied."""
    ranked_per_group: int = Field(default=1, gt=0)
    """The best against the worst, the second best against the second worst, ..."""
    across_temperatures: bool = False
    """Ranked pairs: the chosen are of the lowest temperature, the rejected of the highest."""
    golden_rejected: Literal["first", "worst"] = "first"
    """The recording is preferred to the first sample drawn, as in the paper, or to the worst."""
    drop_truncated: bool = False
    """Otherwise a truncated sample may be rejected; it is never chosen."""
    good_above: FiniteFloat | None = None
    """Labelled samples: those with a higher reward are good."""
    bad_below: FiniteFloat | None = None
    """Labelled samples: those with a lower reward are bad. Who is between the two is left out."""

    @model_validator(mode="after")
    def _labels_have_limits(self) -> "PairingConfig":
        limits = (self.good_above, self.bad_below)
        if PairKind.LABELLED not in self.kinds:
            if limits != (None, None):
                raise ValueError("good_above and bad_below are of kinds: [labelled]; remove them")
            return self
        if self.good_above is None or self.bad_below is None:
            raise ValueError(
                "labelled answers need good_above and bad_below, in units of the reward; with "
                "reward.normalise: group 0 is the mean of a prompt's samples"
            )
        if self.good_above < self.bad_below:
            raise ValueError("good_above is below bad_below: a sample would be good and bad")
        return self
