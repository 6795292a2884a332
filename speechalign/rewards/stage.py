"""The Ray Data face of a judge: rendered rows in, the same rows with its measures out."""

import time
from typing import Any

import pyarrow as pa

from speechalign.config.judges import ListenerConfig
from speechalign.judges.base import Judge
from speechalign.judges.build import build_judge
from speechalign.rows import clip_from_row
from speechalign.types import Unmeasured

CLIP_COLUMNS = [
    "prompt_id",
    "sample_index",
    "text",
    "waveform_pcm",
    "reference_pcm",
    "sample_rate_hz",
    "golden_duration_s",
]


class JudgeStage:
    """A plain class: tests call it directly, Ray Data makes actors of it.

    Each measure becomes a nullable float column, each remark one of text. A failed judgement is
    null, and its reason is added to `judge_errors`. `<name>_seconds` is the row's share of the
    batch's time.
    """

    def __init__(self, config: ListenerConfig, judge: Judge | None = None) -> None:
        self._judge = judge or build_judge(config)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Judge one batch."""
        started_s = time.perf_counter()
        rows = batch.select(CLIP_COLUMNS).to_pylist()
        judgements = self._judge.judge([clip_from_row(row) for row in rows])
        before_errors: list[Any] = batch["judge_errors"].to_pylist()
        errors = [
            _joined(before, judgement.reason) if isinstance(judgement, Unmeasured) else before
            for before, judgement in zip(before_errors, judgements, strict=True)
        ]
        columns = dict.fromkeys(self._judge.measures, pa.float32())
        columns |= dict.fromkeys(self._judge.remarks, pa.string())
        for name, kind in columns.items():
            values = [None if isinstance(j, Unmeasured) else j[name] for j in judgements]
            batch = batch.append_column(name, pa.array(values, kind))
        index = batch.schema.get_field_index("judge_errors")
        batch = batch.set_column(index, batch.schema.field(index), pa.array(errors, pa.string()))
        share_s = (time.perf_counter() - started_s) / max(1, len(rows))
        seconds = pa.array([share_s] * len(rows), pa.float32())
        return batch.append_column(f"{self._judge.name}_seconds", seconds)


def _joined(before: str, reason: str) -> str:
    return f"{before}; {reason}" if before else reason
