"""Measures to a reward. Pure: no model, no cluster."""

from collections.abc import Mapping, Sequence

from speechalign.config.judges import RewardConfig
from speechalign.errors import BudgetExceeded
from speechalign.types import Measured, Score, Unmeasured


def combine(measures: Mapping[str, Score], config: RewardConfig) -> Score:
    """Return the weighted sum of the terms; without one of them there is no reward."""
    total = 0.0
    for term in config.terms:
        score = measures[term.measure]
        if isinstance(score, Unmeasured):
            return Unmeasured(f"{term.measure}: {score.reason}")
        value = score.value if term.highest is None else min(score.value, term.highest)
        total += term.weight * value
    return Measured(total)


def check_budget(rewards: Sequence[Score], config: RewardConfig) -> int:
    """Return how many rewards are missing.

    Raises:
        BudgetExceeded: more than the configured share of them.
    """
    reasons = [reward.reason for reward in rewards if isinstance(reward, Unmeasured)]
    if len(reasons) > config.failure_budget * len(rewards):
        raise BudgetExceeded(
            f"{len(reasons)} of {len(rewards)} samples have no reward, "
            f"{config.failure_budget:.0%} may lack one; the first reason: {reasons[0]}"
        )
    return len(reasons)
