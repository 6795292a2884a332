"""Measures to a reward. Pure: no model, no cluster."""

import math
from collections.abc import Mapping, Sequence

import pyarrow as pa

from speechalign.config.judges import RewardConfig
from speechalign.errors import BudgetExceeded
from speechalign.rows import score_from_cell
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


def best_of_groups(table: pa.Table, config: RewardConfig) -> pa.Table:
    """Return the row of each prompt with the highest reward; the first of equals.

    A prompt without any reward is answered by its first sample, as if nobody had chosen.

    Args:
        table: judged samples, in the order of sampling.
        config: the reward.

    Raises:
        BudgetExceeded: too many samples have no reward.
    """
    measures = sorted({term.measure for term in config.terms})
    rows = table.select(["prompt_id", "judge_errors", *measures]).to_pylist()
    rewards = [
        combine(
            {name: score_from_cell(row[name], row["judge_errors"]) for name in measures}, config
        )
        for row in rows
    ]
    check_budget(rewards, config)
    best: dict[str, tuple[float, int]] = {}
    for index, (row, reward) in enumerate(zip(rows, rewards, strict=True)):
        value = reward.value if isinstance(reward, Measured) else -math.inf
        if row["prompt_id"] not in best or value > best[row["prompt_id"]][0]:
            best[row["prompt_id"]] = (value, index)
    return table.take([index for _, index in best.values()])


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
