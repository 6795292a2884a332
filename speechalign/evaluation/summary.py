"""Judged samples to one line of a table.

A failed judgement is left out and counted; it is never a zero. A paired difference uses the
prompts that both sides have measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from speechalign.errors import DataError
from speechalign.evaluation.statistics import Estimate, ratio_difference, ratio_estimate


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
    digits: int = 2


METRICS = (
    Metric(key="wer", label="WER %", total="eval_word_errors", count="eval_words",
           is_percent=True, digits=1),
    Metric(key="cer", label="CER %", total="eval_cer", is_percent=True, digits=1),
    Metric(key="sim", label="SIM", total="speaker_similarity", digits=3),
    Metric(key="distillmos", label="DistillMOS", total="distillmos"),
    Metric(key="dnsmos", label="DNSMOS", total="dnsmos"),
    Metric(key="stop", label="stopped %", total="stopped", is_percent=True, digits=1),
    Metric(key="duration", label="duration ratio", total="duration_ratio"),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What was measured of one system."""

    name: str
    num_prompts: int
    estimates: Mapping[str, Estimate]
    missing: Mapping[str, int]
    """Prompts without a measurement, per metric."""

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


def summarise(name: str, judged: pa.Table, num_resamples: int) -> Summary:
    """Return the estimates of all metrics that the table has columns for.

    Raises:
        DataError: the table is empty.
    """
    if not judged.num_rows:
        raise DataError(f"{name}: there is not one judged sample to evaluate")
    estimates: dict[str, Estimate] = {}
    missing: dict[str, int] = {}
    for metric in METRICS:
        measured = _measured(judged, metric)
        if measured is None:
            continue
        missing[metric.key] = judged.num_rows - len(measured)
        if measured:
            totals_P, counts_P = _arrays(list(measured.values()))
            estimates[metric.key] = ratio_estimate(totals_P, counts_P, num_resamples)
    return Summary(name=name, num_prompts=judged.num_rows, estimates=estimates, missing=missing)


def compare(before: pa.Table, after: pa.Table, num_resamples: int) -> dict[str, Estimate]:
    """Return after minus before for every metric, over the prompts that both have measured."""
    differences: dict[str, Estimate] = {}
    for metric in METRICS:
        left, right = _measured(before, metric), _measured(after, metric)
        both = sorted((left or {}).keys() & (right or {}).keys())
        if left and right and both:
            differences[metric.key] = ratio_difference(
                _arrays([left[id_] for id_ in both]),
                _arrays([right[id_] for id_ in both]),
                num_resamples,
            )
    return differences


def text_table(summaries: Sequence[Summary], difference: Mapping[str, Estimate]) -> str:
    """Return the result as aligned plain text, intervals in brackets."""
    return "\n".join(
        "  ".join(
            cell.ljust(width) for cell, width in zip(row, _widths(rows), strict=True)
        ).rstrip()
        for rows in [table_rows(summaries, difference)]
        for row in rows
    )


def markdown_table(summaries: Sequence[Summary], difference: Mapping[str, Estimate]) -> str:
    """Return the result for a README."""
    rows = table_rows(summaries, difference)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def table_rows(summaries: Sequence[Summary], difference: Mapping[str, Estimate]) -> list[list[str]]:
    """Return the cells of the table: a head, a row a system, the paired difference."""
    present = [m for m in METRICS if any(m.key in s.estimates for s in summaries)]
    rows = [["system", "prompts", *(metric.label for metric in present)]]
    for summary in summaries:
        cells = [_cell(summary.estimates.get(metric.key), metric) for metric in present]
        rows.append([summary.name, str(summary.num_prompts), *cells])
    if difference:
        cells = [_cell(difference.get(metric.key), metric, signed=True) for metric in present]
        rows.append(["difference (paired)", "", *cells])
    return rows


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]


def _cell(estimate: Estimate | None, metric: Metric, *, signed: bool = False) -> str:
    if estimate is None:
        return "not measured"
    scale = 100.0 if metric.is_percent else 1.0
    sign = "+" if signed else ""
    value, low, high = (
        f"{scale * number:{sign}.{metric.digits}f}"
        for number in (estimate.value, estimate.low, estimate.high)
    )
    return f"{value} [{low}, {high}]"


def _measured(judged: pa.Table, metric: Metric) -> dict[str, tuple[float, float]] | None:
    if metric.total == "stopped":
        values = [0.0 if cut else 1.0 for cut in judged["is_truncated"].to_pylist()]
    elif metric.total in judged.column_names:
        values = judged[metric.total].to_pylist()
    else:
        return None
    ones = [1.0] * judged.num_rows
    counts = judged[metric.count].to_pylist() if metric.count else ones
    ids: list[Any] = judged["prompt_id"].to_pylist()
    return {
        id_: (value, count)
        for id_, value, count in zip(ids, values, counts, strict=True)
        if value is not None and count is not None
    }


def _arrays(
    pairs: Sequence[tuple[float, float]],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    totals_P, counts_P = np.asarray(pairs, dtype=np.float64).T
    return totals_P, counts_P
