"""Judged samples to one line of a table.

A failed judgement, null or not a finite number, is left out and counted; it is never a zero.
Samples of one prompt are one entry, so that resampling keeps them together. A paired difference
uses the prompts that both sides have measured.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from speechalign.config.judges import JudgeConfig, judge_measures
from speechalign.errors import DataError
from speechalign.evaluation.statistics import (
    Estimate,
    ratio_difference,
    ratio_estimate,
    relative_change,
    share_closed,
)

Ratios: TypeAlias = tuple[NDArray[np.float64], NDArray[np.float64]]
"""What is summed and what it is divided by, an entry a prompt."""

Differences: TypeAlias = Mapping[str, Mapping[str, Estimate]]
"""Of each iteration, by name, to the system before; paired, by the key of the metric."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A column of the result table."""

    key: str
    label: str
    total: str
    """The judged column that is summed."""
    count: str | None = None
    """The judged column that it is divided by; without one, the number of prompts."""
    is_percent: bool = False
    is_error: bool = False
    digits: int = 2

    @property
    def scale(self) -> float:
        """What a value is multiplied by to be shown."""
        return 100.0 if self.is_percent else 1.0

    def shown(self, estimate: Estimate, *, signed: bool = False) -> str:
        """Return an estimate as a table has it."""
        return estimate.shown(scale=self.scale, digits=self.digits, signed=signed)


METRICS = (
    Metric(key="wer", label="WER %", total="eval_word_errors", count="eval_words",
           is_percent=True, is_error=True, digits=1),
    # A mean over answers, where the WER is errors over words of all: short ones weigh more here.
    Metric(key="cer", label="CER %", total="eval_cer", is_percent=True, is_error=True,
           digits=1),
    Metric(key="sim", label="SIM", total="speaker_similarity", digits=3),
    Metric(key="distillmos", label="DistillMOS", total="distillmos"),
    Metric(key="dnsmos", label="DNSMOS", total="dnsmos"),
    Metric(key="stop", label="stopped %", total="stopped", is_percent=True, digits=1),
    Metric(key="duration", label="duration ratio", total="duration_ratio"),
    Metric(key="silence", label="silence %", total="silence_ratio", is_percent=True, digits=1),
)  # fmt: skip
OWN = "own_"
"""Begins the key of a metric that is not among the above, which may be called as one of them."""


def metrics_of(judges: Sequence[JudgeConfig]) -> tuple[Metric, ...]:
    """Return the columns of a table: the fixed ones, and those of judges that have none there.

    Whether more of the latter is better is not known, so no guard watches them.
    """
    fixed = {metric.total for metric in METRICS}
    measures = [judge_measures(judge) for judge in judges]
    own = [name for names in measures if not fixed.intersection(names) for name in names]
    return (*METRICS, *map(_own_metric, own))


def measured_metrics(summaries: Sequence["Summary"]) -> list[Metric]:
    """Return the metrics that at least one system has an estimate of."""
    keys = dict.fromkeys(key for summary in summaries for key in summary.estimates)
    fixed = [metric for metric in METRICS if metric.key in keys]
    own = [_own_metric(key.removeprefix(OWN)) for key in keys if key.startswith(OWN)]
    return [*fixed, *own]


def _own_metric(measure: str) -> Metric:
    return Metric(key=OWN + measure, label=measure, total=measure)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What was measured of one system."""

    name: str
    num_prompts: int
    estimates: Mapping[str, Estimate]
    missing: Mapping[str, int]
    """Samples without a measurement, per metric."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Summary":
        """Return what `to_json` was made of."""
        estimates = {key: Estimate(**value) for key, value in values["estimates"].items()}
        return cls(
            name=values["name"],
            num_prompts=values["num_prompts"],
            estimates=estimates,
            missing=values["missing"],
        )


def summarise(
    name: str, judged: pa.Table, num_resamples: int, metrics: Sequence[Metric] = METRICS
) -> Summary:
    """Return the estimates of those metrics that the table has columns for.

    Raises:
        DataError: the table is empty.
    """
    if not judged.num_rows:
        raise DataError(f"{name}: there is not one judged sample to evaluate")
    estimates: dict[str, Estimate] = {}
    missing: dict[str, int] = {}
    for metric in metrics:
        measured = _measured(judged, metric)
        if measured is None:
            continue
        by_prompt, missing[metric.key] = measured
        if by_prompt:
            totals_P, counts_P = _arrays(list(by_prompt.values()))
            estimates[metric.key] = ratio_estimate(totals_P, counts_P, num_resamples)
    num_prompts = len(set(judged["prompt_id"].to_pylist()))
    return Summary(name=name, num_prompts=num_prompts, estimates=estimates, missing=missing)


def compare(
    before: pa.Table,
    after: pa.Table,
    num_resamples: int,
    metrics: Sequence[Metric] = METRICS,
) -> dict[str, Estimate]:
    """Return after minus before for every metric, over the prompts that both have measured."""
    pairs = {metric.key: _paired(before, after, metric) for metric in metrics}
    return {key: ratio_difference(*pair, num_resamples) for key, pair in pairs.items() if pair}


def measured_keys(judged: pa.Table, metrics: Sequence[Metric]) -> frozenset[str]:
    """Return the metrics that at least one prompt has a measurement of."""
    measured = {metric.key: _measured(judged, metric) for metric in metrics}
    return frozenset(key for key, found in measured.items() if found is not None and found[0])


def relative_error_change(
    before: pa.Table, after: pa.Table, num_resamples: int
) -> dict[str, Estimate]:
    """Return (after - before) / before of the error rates, over the prompts that both have.

    The other metrics have no zero that a share could be taken of.
    """
    pairs = {metric.key: _paired(before, after, metric) for metric in METRICS if metric.is_error}
    changes = {key: relative_change(*pair, num_resamples) for key, pair in pairs.items() if pair}
    return {key: change for key, change in changes.items() if change is not None}


def gap_closed(
    before: pa.Table, after: pa.Table, goal: pa.Table, num_resamples: int
) -> dict[str, Estimate]:
    """Return (before - after) / (before - goal) of every metric, over the prompts all have.

    A metric in which before and goal do not differ for sure is left out.
    """
    shares: dict[str, Estimate] = {}
    for metric in METRICS:
        aligned = _aligned((before, after, goal), metric)
        share = share_closed(aligned[0], aligned[1], aligned[2], num_resamples) if aligned else None
        if share is not None:
            shares[metric.key] = share
    return shares


def text_table(summaries: Sequence[Summary], differences: Differences) -> str:
    """Return the result as aligned plain text, intervals in brackets."""
    return aligned_text(table_rows(summaries, differences))


def aligned_text(rows: Sequence[Sequence[str]]) -> str:
    """Return the cells of a table as plain text, a line a row."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(summaries: Sequence[Summary], differences: Differences) -> str:
    """Return the result for a README."""
    return markdown_rows(table_rows(summaries, differences))


def markdown_rows(rows: Sequence[Sequence[str]]) -> str:
    """Return the cells of a table, the first row its head, as Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def table_rows(summaries: Sequence[Summary], differences: Differences) -> list[list[str]]:
    """Return the cells of the table: a head, a row a system, a row a paired difference."""
    present = measured_metrics(summaries)
    rows = [["system", "prompts", *(metric.label for metric in present)]]
    for summary in summaries:
        cells = [
            _cell(summary.estimates.get(metric.key), metric)
            + _missing(summary.missing.get(metric.key, 0))
            for metric in present
        ]
        rows.append([summary.name, str(summary.num_prompts), *cells])
    for name, difference in differences.items():
        cells = [_cell(difference.get(metric.key), metric, signed=True) for metric in present]
        label = "difference (paired)" if len(differences) == 1 else f"{name}, difference (paired)"
        rows.append([label, "", *cells])
    return rows


def _cell(estimate: Estimate | None, metric: Metric, *, signed: bool = False) -> str:
    return "not measured" if estimate is None else metric.shown(estimate, signed=signed)


def _missing(count: int) -> str:
    return f" ({count} missing)" if count else ""


def _paired(before: pa.Table, after: pa.Table, metric: Metric) -> tuple[Ratios, Ratios] | None:
    aligned = _aligned((before, after), metric)
    return (aligned[0], aligned[1]) if aligned else None


def _aligned(tables: Sequence[pa.Table], metric: Metric) -> list[Ratios]:
    """Return the sums and counts of the prompts that all have measured, in one order; or []."""
    measured = [_measured(table, metric) for table in tables]
    sides = [{} if one is None else one[0] for one in measured]
    shared = sorted(set.intersection(*(set(side) for side in sides)))
    return [_arrays([side[id_] for id_ in shared]) for side in sides] if shared else []


def _measured(
    judged: pa.Table, metric: Metric
) -> tuple[dict[str, tuple[float, float]], int] | None:
    """Return sum and count per prompt, and the number of samples that have no measurement."""
    if metric.key == "stop":
        values = [0.0 if cut else 1.0 for cut in judged["is_truncated"].to_pylist()]
    elif metric.total in judged.column_names:
        values = judged[metric.total].to_pylist()
    else:
        return None
    ones = [1.0] * judged.num_rows
    counts = judged[metric.count].to_pylist() if metric.count else ones
    ids: list[Any] = judged["prompt_id"].to_pylist()
    by_prompt: dict[str, tuple[float, float]] = {}
    num_missing = 0
    for id_, value, count in zip(ids, values, counts, strict=True):
        if value is None or not math.isfinite(value) or not count:
            num_missing += 1
        else:
            total, number = by_prompt.get(id_, (0.0, 0.0))
            by_prompt[id_] = (total + value, number + count)
    return by_prompt, num_missing


def _arrays(pairs: Sequence[tuple[float, float]]) -> Ratios:
    totals_P, counts_P = np.asarray(pairs, dtype=np.float64).T
    return totals_P, counts_P
