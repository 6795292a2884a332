"""Measures to a reward. Pure: no model, no cluster."""

import math
from collections.abc import Sequence
from statistics import fmean, pstdev

import pyarrow as pa

from speechalign.config.judges import TRUNCATED, RewardConfig, RewardTermConfig
from speechalign.errors import BudgetExceeded
from speechalign.judges.base import SILENT
from speechalign.rows import NOT_RENDERED, Row, score_from_cell
from speechalign.types import Measured, Score, Unmeasured

STD_FLOOR = 1e-9


def rewards_of(rows: Sequence[Row], config: RewardConfig) -> list[Score]:
    """Return the reward of each judged sample; without one of its terms it has none.

    Nor has one that was not rendered: what judges say of its silence is not about the policy.

    Args:
        rows: judged samples, whole groups, with the columns that the terms name.
        config: the terms.
    """
    terms = [_term(rows, term) for term in config.terms]
    if config.normalise == "group":
        terms = [_normalised(rows, term) for term in terms]
    return [_weighted([term[index] for term in terms], config) for index in range(len(rows))]


def _term(rows: Sequence[Row], term: RewardTermConfig) -> list[Score]:
    """Return one measure of each row, clipped, or its distance to the target."""
    scores: list[Score] = []
    for row in rows:
        errors = row.get("judge_errors", "")
        score: Score
        if errors.startswith(NOT_RENDERED):
            score = Unmeasured(errors)
        elif term.measure == TRUNCATED:
            score = Measured(float(row["is_truncated"]))
        elif term.when_silent is not None and row[term.measure] is None and SILENT in errors:
            score = Measured(term.when_silent)
        else:
            score = score_from_cell(row[term.measure], errors)
        if isinstance(score, Unmeasured):
            scores.append(Unmeasured(f"{term.measure}: {score.reason}"))
            continue
        value = score.value if term.target is None else abs(score.value - term.target)
        if not math.isfinite(value):
            scores.append(Unmeasured(f"{term.measure}: {value} is no number"))
            continue
        value = value if term.lowest is None else max(value, term.lowest)
        scores.append(Measured(value if term.highest is None else min(value, term.highest)))
    return scores


def _normalised(rows: Sequence[Row], scores: Sequence[Score]) -> list[Score]:
    """Return each score less the mean of its prompt's, by their deviation; equal ones are 0."""
    groups: dict[str, list[float]] = {}
    for row, score in zip(rows, scores, strict=True):
        if isinstance(score, Measured):
            groups.setdefault(row["prompt_id"], []).append(score.value)
    moments = {id_: (fmean(values), pstdev(values)) for id_, values in groups.items()}
    normalised: list[Score] = []
    for row, score in zip(rows, scores, strict=True):
        if isinstance(score, Measured):
            mean, deviation = moments[row["prompt_id"]]
            score = Measured((score.value - mean) / deviation if deviation > STD_FLOOR else 0.0)
        normalised.append(score)
    return normalised


def _weighted(scores: Sequence[Score], config: RewardConfig) -> Score:
    total = 0.0
    for score, term in zip(scores, config.terms, strict=True):
        if isinstance(score, Unmeasured):
            return score
        total += term.weight * score.value
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
    needed = {"prompt_id", "judge_errors", "is_truncated", *(t.measure for t in config.terms)}
    rows = table.select([name for name in table.column_names if name in needed]).to_pylist()
    rewards = rewards_of(rows, config)
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
            f"{len(reasons)} of {len(rewards)} samples have no reward; reward.failure_budget "
            f"allows {100 * config.failure_budget:g} %; first reason: {reasons[0]}"
        )
    return len(reasons)
