"""How judged samples become pairs."""

from typing import Literal

from pydantic import Field

from speechalign.config.base import Config
from speechalign.types import PairKind


class PairingConfig(Config):
    """Which pairs are made of a group of samples."""

    kinds: tuple[Literal[PairKind.GOLDEN, PairKind.RANKED], ...] = Field(
        default=(PairKind.RANKED,), min_length=1
    )
    """golden: the recording against a sample, the paper's pairs. ranked: best against worst."""
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
