"""The Ray Data face of a judge: rendered rows in, the same rows with its measures out."""

import time
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from speechalign.config.judges import ListenerConfig
from speechalign.judges.base import SILENT, Judge, Judgement, is_audible
from speechalign.judges.build import build_judge
from speechalign.rows import RENDERED, clip_from_row
from speechalign.types import Clip, Unmeasured

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
    null, and its reason is added to `judge_errors`, which says where there was nothing to hear (a
    reward may have a value for that: `when_silent`). `<name>_seconds` is the row's share of the
    batch's time.
    """

    def __init__(self, config: ListenerConfig, judge: Judge | None = None) -> None:
        self._judge = judge or build_judge(config)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Judge one batch."""
        started_s = time.perf_counter()
        rows = batch.select(CLIP_COLUMNS).to_pylist()
        clips = [clip_from_row(row) for row in rows]
        judgements = self._judge.judge(clips)
        columns = dict.fromkeys(self._judge.measures, pa.float32())
        columns |= dict.fromkeys(self._judge.remarks, pa.string())
        for name, kind in columns.items():
            values = [None if isinstance(j, Unmeasured) else j[name] for j in judgements]
            batch = batch.append_column(name, pa.array(values, kind))
        reasons = [_reason(clip, one) for clip, one in zip(clips, judgements, strict=True)]
        batch = with_errors(batch, reasons)
        share_s = (time.perf_counter() - started_s) / max(1, len(rows))
        seconds = pa.array([share_s] * len(rows), pa.float32())
        return batch.append_column(f"{self._judge.name}_seconds", seconds)


def _reason(clip: Clip, judgement: Judgement) -> str:
    if not isinstance(judgement, Unmeasured):
        return ""
    return judgement.reason if is_audible(clip) else f"{judgement.reason} ({SILENT})"


def with_errors(batch: pa.Table, reasons: Sequence[str]) -> pa.Table:
    """Add reasons, empty ones aside, to `judge_errors`; only a rendered batch has it before."""
    name = "judge_errors"
    index = batch.schema.get_field_index(name)
    before: list[Any] = batch[name].to_pylist() if index >= 0 else [""] * batch.num_rows
    both = zip(before, reasons, strict=True)
    joined = pa.array(["; ".join(part for part in parts if part) for parts in both], pa.string())
    if index < 0:
        return batch.append_column(RENDERED.field(name), joined)
    return batch.set_column(index, batch.schema.field(index), joined)
