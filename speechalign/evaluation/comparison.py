"""Systems side by side: who wins against the baseline, by each judge. Pure.

A win rate is (wins + ties / 2) / prompts, over the prompts that both systems have measured; .5
is no difference. SpeechAlign, Figure 1, asks people; here each judge of the evaluation votes.

Shapes: P prompts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from speechalign.evaluation.statistics import Estimate, ratio_estimate
from speechalign.evaluation.summary import (
    METRICS,
    Metric,
    Summary,
    compare,
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
    facts: Mapping[str, Any]
    """Where it comes from: arm, seed, iteration, commit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """What is said of one system."""

    summary: Summary
    wins: Mapping[str, Estimate]
    """By the column of the vote; empty for the baseline."""
    relative: Mapping[str, Estimate]
    """Change of the error rates against the baseline, as a share."""
    difference: Mapping[str, Estimate]
    """Paired, against the baseline."""
    seconds: float | None
    facts: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "summary": self.summary.to_json(),
            "wins": {key: asdict(value) for key, value in self.wins.items()},
            "relative": {key: asdict(value) for key, value in self.relative.items()},
            "difference": {key: asdict(value) for key, value in self.difference.items()},
            "seconds": self.seconds,
            "facts": dict(self.facts),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Compared":
        """Return what `to_json` was made of."""
        wins, relative, difference = (
            {key: Estimate(**value) for key, value in values[name].items()}
            for name in ("wins", "relative", "difference")
        )
        return cls(
            summary=Summary.from_json(values["summary"]),
            wins=wins,
            relative=relative,
            difference=difference,
            seconds=values["seconds"],
            facts=values["facts"],
        )


def compare_systems(
    baseline: System,
    others: Sequence[System],
    num_resamples: int,
    metrics: Sequence[Metric] = METRICS,
) -> list[Compared]:
    """Return the baseline and what every other system is against it."""
    return [
        Compared(
            summary=summarise(system.label, system.judged, num_resamples, metrics),
            wins={} if system is baseline else win_rates(baseline, system, num_resamples),
            relative={}
            if system is baseline
            else relative_error_change(baseline.judged, system.judged, num_resamples),
            difference={}
            if system is baseline
            else compare(baseline.judged, system.judged, num_resamples, metrics),
            seconds=system.seconds,
            facts=system.facts,
        )
        for system in (baseline, *others)
    ]


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
    head = [
        *rows[0],
        "WER against the first",
        *(f"wins % by {vote.label}" for vote in voted),
        "min",
    ]
    body = [
        [
            *cells,
            _percent(one.relative.get("wer"), signed=True),
            *(_percent(one.wins.get(vote.column)) for vote in voted),
            "" if one.seconds is None else f"{one.seconds / 60:.0f}",
        ]
        for cells, one in zip(rows[1:], compared, strict=True)
    ]
    return [head, *body]


def _values(table: pa.Table, vote: Vote) -> dict[str, float]:
    if vote.column not in table.column_names:
        return {}
    pairs = zip(table["prompt_id"].to_pylist(), table[vote.column].to_pylist(), strict=True)
    votes = {str(id_): float(value) for id_, value in pairs if value is not None}
    return {id_: value for id_, value in votes.items() if math.isfinite(value)}


def _percent(estimate: Estimate | None, *, signed: bool = False) -> str:
    return "" if estimate is None else estimate.shown(scale=100, digits=0, signed=signed)
