"""Estimates with bootstrap intervals. Pure numpy.

Prompts are what is resampled: the clips of one prompt, before and after, stay together, which
is what makes a difference paired.

Shapes: P prompts, R resamples.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from speechalign.seeds import derive_seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0

    def shown(self, *, scale: float = 1.0, digits: int, signed: bool = False) -> str:
        """Return the value with its interval in brackets."""
        sign = "+" if signed else ""
        value, low, high = (
            f"{scale * number:{sign}.{digits}f}" for number in (self.value, self.low, self.high)
        )
        return f"{value} [{low}, {high}]"


def ratio_estimate(
    totals_P: NDArray[np.float64], counts_P: NDArray[np.float64], num_resamples: int
) -> Estimate:
    """Return sum(totals) / sum(counts): a corpus WER, or a mean when every count is 1."""
    resampled_R = _resampled_ratio(totals_P, counts_P, num_resamples)
    return percentile_estimate(totals_P.sum() / counts_P.sum(), resampled_R)


def ratio_difference(
    before: tuple[NDArray[np.float64], NDArray[np.float64]],
    after: tuple[NDArray[np.float64], NDArray[np.float64]],
    num_resamples: int,
) -> Estimate:
    """Return the paired difference of two ratios over the same prompts, after minus before."""
    (before_totals_P, before_counts_P), (after_totals_P, after_counts_P) = before, after
    difference_R = _resampled_ratio(
        after_totals_P, after_counts_P, num_resamples
    ) - _resampled_ratio(before_totals_P, before_counts_P, num_resamples)
    value = after_totals_P.sum() / after_counts_P.sum()
    value -= before_totals_P.sum() / before_counts_P.sum()
    return percentile_estimate(value, difference_R)


def relative_change(
    before: tuple[NDArray[np.float64], NDArray[np.float64]],
    after: tuple[NDArray[np.float64], NDArray[np.float64]],
    num_resamples: int,
) -> Estimate | None:
    """Return (after - before) / before over the same prompts: -0.15 is 15 % lower.

    There is none where before is zero in the data or in a resample: the ratio has no interval.
    """
    (before_totals_P, before_counts_P), (after_totals_P, after_counts_P) = before, after
    before_R = _resampled_ratio(before_totals_P, before_counts_P, num_resamples)
    if not before_totals_P.sum() or not before_R.all():
        return None
    after_R = _resampled_ratio(after_totals_P, after_counts_P, num_resamples)
    before_value = before_totals_P.sum() / before_counts_P.sum()
    value = after_totals_P.sum() / after_counts_P.sum() / before_value - 1.0
    return percentile_estimate(value, after_R / before_R - 1.0)


def share_closed(
    before: tuple[NDArray[np.float64], NDArray[np.float64]],
    after: tuple[NDArray[np.float64], NDArray[np.float64]],
    goal: tuple[NDArray[np.float64], NDArray[np.float64]],
    num_resamples: int,
) -> Estimate | None:
    """Return (before - after) / (before - goal) over the same prompts: 1 closes the whole gap.

    There is none where the gap is zero, or has the other sign in a resample: a share of a gap
    that may not exist has no interval.
    """
    before_R, after_R, goal_R = (
        _resampled_ratio(*ratios, num_resamples) for ratios in (before, after, goal)
    )
    before_value, after_value, goal_value = (
        totals_P.sum() / counts_P.sum() for totals_P, counts_P in (before, after, goal)
    )
    gap, gap_R = before_value - goal_value, before_R - goal_R
    if not gap or not (np.sign(gap_R) == np.sign(gap)).all():
        return None
    return percentile_estimate((before_value - after_value) / gap, (before_R - after_R) / gap_R)


def _resampled_ratio(
    totals_P: NDArray[np.float64], counts_P: NDArray[np.float64], num_resamples: int
) -> NDArray[np.float64]:
    picked_RP = resampled_indices(len(totals_P), num_resamples)
    return totals_P[picked_RP].sum(1) / counts_P[picked_RP].sum(1)


def resampled_indices(num_prompts: int, num_resamples: int) -> NDArray[np.int64]:
    """Return picked_RP, prompts drawn with replacement: the same ones every time."""
    rng = np.random.default_rng(derive_seed("bootstrap", num_prompts))
    return rng.integers(0, num_prompts, (num_resamples, num_prompts))


def percentile_estimate(value: float, resampled_R: NDArray[np.float64]) -> Estimate:
    """Return a value with the 95 % interval of its resamples."""
    low, high = np.quantile(resampled_R, [0.025, 0.975])
    return Estimate(value=float(value), low=float(low), high=float(high))
