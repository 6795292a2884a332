"""Systems side by side: who wins against the baseline, by each judge. Pure.

A win rate is (wins + ties / 2) / prompts, over the prompts that both systems have measured; .5
is no difference. SpeechAlign, Figure 1, asks people; here each judge of the evaluation votes.

Shapes: P prompts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from speechalign.evaluation.statistics import Estimate, ratio_estimate
from speechalign.evaluation.summary import (
    METRICS,
    Metric,
    Summary,
    compare,
    gap_closed,
    relative_error_change,
    summarise,
    table_rows,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """A judge that votes."""

    column: str
    label: str
    higher_is_better: bool = True


VOTES = (
    Vote(column="eval_wer", label="WER", higher_is_better=False),
    Vote(column="speaker_similarity", label="SIM"),
    Vote(column="distillmos", label="DistillMOS"),
    Vote(column="dnsmos", label="DNSMOS"),
    Vote(column="reward_model", label="reward model"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """A row of the comparison."""

    label: str
    judged: pa.Table
    seconds: float | None = None
    """Wall clock from the start of its arm to its policy, shared stages included."""
    stage_seconds: Mapping[str, float] = field(default_factory=dict[str, float])
    """Wall clock of each stage of its iteration."""
    facts: Mapping[str, Any]
    """Where it comes from: arm, seed, iteration, commit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """What is said of one system."""

    summary: Summary
    wins: Mapping[str, Estimate] = field(default_factory=dict[str, Estimate])
    """By the column of the vote; empty for the baseline, as is all that compares with it."""
    relative: Mapping[str, Estimate] = field(default_factory=dict[str, Estimate])
    """Change of the error rates against the baseline, as a share."""
    difference: Mapping[str, Estimate] = field(default_factory=dict[str, Estimate])
    """Paired, against the baseline."""
    closed: Mapping[str, Estimate] = field(default_factory=dict[str, Estimate])
    """Shares of the gap between the baseline and the ceiling, paired; empty without a ceiling."""
    seconds: float | None
    stage_seconds: Mapping[str, float]
    facts: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "summary": self.summary.to_json(),
            "wins": {key: asdict(value) for key, value in self.wins.items()},
            "relative": {key: asdict(value) for key, value in self.relative.items()},
            "difference": {key: asdict(value) for key, value in self.difference.items()},
            "closed": {key: asdict(value) for key, value in self.closed.items()},
            "seconds": self.seconds,
            "stage_seconds": dict(self.stage_seconds),
            "facts": dict(self.facts),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Compared":
        """Return what `to_json` was made of."""
        wins, relative, difference, closed = (
            {key: Estimate(**value) for key, value in values[name].items()}
            for name in ("wins", "relative", "difference", "closed")
        )
        return cls(
            summary=Summary.from_json(values["summary"]),
            wins=wins,
            relative=relative,
            difference=difference,
            closed=closed,
            seconds=values["seconds"],
            stage_seconds=values["stage_seconds"],
            facts=values["facts"],
        )


def compare_systems(
    baseline: System,
    others: Sequence[System],
    num_resamples: int,
    metrics: Sequence[Metric] = METRICS,
    ceiling: System | None = None,
) -> list[Compared]:
    """Return the baseline, what every other system is against it, and the ceiling, if any."""

    def alone(system: System) -> Compared:
        return Compared(
            summary=summarise(system.label, system.judged, num_resamples, metrics),
            seconds=system.seconds,
            stage_seconds=system.stage_seconds,
            facts=system.facts,
        )

    def against_it(system: System) -> Compared:
        before, after = baseline.judged, system.judged
        goal = None if ceiling is None else ceiling.judged
        return replace(
            alone(system),
            wins=win_rates(baseline, system, num_resamples),
            relative=relative_error_change(before, after, num_resamples),
            difference=compare(before, after, num_resamples, metrics),
            closed={} if goal is None else gap_closed(before, after, goal, num_resamples),
        )

    goals = [] if ceiling is None else [alone(ceiling)]
    return [alone(baseline), *map(against_it, others), *goals]


def win_rates(baseline: System, system: System, num_resamples: int) -> dict[str, Estimate]:
    """Return the win rate by each judge that both tables have a column of."""
    rates: dict[str, Estimate] = {}
    for vote in VOTES:
        before, after = (_values(table, vote) for table in (baseline.judged, system.judged))
        both = sorted(before.keys() & after.keys())
        if both:
            gains_P = np.array([after[id_] - before[id_] for id_ in both])
            points_P = (np.sign(gains_P if vote.higher_is_better else -gains_P) + 1) / 2
            rates[vote.column] = ratio_estimate(points_P, np.ones(len(both)), num_resamples)
    return rates


def comparison_rows(compared: Sequence[Compared]) -> list[list[str]]:
    """Return the cells of the table: a head and a row a system."""
    rows = table_rows([one.summary for one in compared], {})
    voted = [vote for vote in VOTES if any(vote.column in one.wins for one in compared)]
    has_goal = any("wer" in one.closed for one in compared)
    head = [
        *rows[0],
        "WER against the first",
        *(["gap closed %"] if has_goal else []),
        *(f"wins % by {vote.label}" for vote in voted),
        "min",
    ]
    body = [
        [
            *cells,
            _percent(one.relative.get("wer"), signed=True),
            *([_percent(one.closed.get("wer"))] if has_goal else []),
            *(_percent(one.wins.get(vote.column)) for vote in voted),
            "" if one.seconds is None else f"{one.seconds / 60:.0f}",
        ]
        for cells, one in zip(rows[1:], compared, strict=True)
    ]
    return [head, *body]


STAGES = {
    "scored": "sampled and judged",
    "pairs": "paired",
    "policy": "trained",
    "evaluation": "evaluated",
}


def time_rows(compared: Sequence[Compared]) -> list[list[str]]:
    """Return the cells of the table of wall clock, in minutes: a head and a row an iteration.

    A stage that another run had made already took no time, and has an empty cell.
    """
    body = [
        [
            one.summary.name,
            *(_minutes(one.stage_seconds.get(stage)) for stage in STAGES),
        ]
        for one in compared
        if one.stage_seconds
    ]
    return [["minutes", *STAGES.values()], *body]


def _minutes(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds / 60:.1f}"


def _values(table: pa.Table, vote: Vote) -> dict[str, float]:
    if vote.column not in table.column_names:
        return {}
    pairs = zip(table["prompt_id"].to_pylist(), table[vote.column].to_pylist(), strict=True)
    votes = {str(id_): float(value) for id_, value in pairs if value is not None}
    return {id_: value for id_, value in votes.items() if math.isfinite(value)}


def _percent(estimate: Estimate | None, *, signed: bool = False) -> str:
    return "" if estimate is None else estimate.shown(scale=100, digits=0, signed=signed)
