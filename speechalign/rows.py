"""The one place where typed objects become Arrow rows and rows become objects.

Codes are stored flat, level after level (`codes_KT.reshape(-1)`), with the number of frames
beside them. Sound is stored as 16-bit PCM bytes. A judgement that failed is a null in its
column, and `judge_errors` says why.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from speechalign.types import (
    Clip,
    Measured,
    PairKind,
    PreferencePair,
    Prompt,
    Sample,
    Score,
    ScoredSample,
    Unmeasured,
)

GOLDEN = pa.schema(
    [
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("phonemes", pa.string(), nullable=False),
        pa.field("speaker_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("num_frames", pa.int32(), nullable=False),
        pa.field("codes", pa.list_(pa.int16()), nullable=False),
        pa.field("codec_fingerprint", pa.string(), nullable=False),
    ]
)
"""Golden codec tokens: what `speechalign prepare` writes and everything else reads."""

PROMPT = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("phonemes", pa.string(), nullable=False),
        pa.field("speaker_id", pa.string(), nullable=False),
        pa.field("num_codebooks", pa.int32(), nullable=False),
        pa.field("speaker_codes", pa.list_(pa.int16()), nullable=False),
        pa.field("golden_codes", pa.list_(pa.int16()), nullable=False),
        pa.field("codec_fingerprint", pa.string(), nullable=False),
    ]
)

SAMPLE = pa.schema(
    [
        *PROMPT,
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("policy_version", pa.int64(), nullable=False),
        pa.field("prompt_token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("logprobs", pa.list_(pa.float32()), nullable=False),
        pa.field("temperature", pa.float32(), nullable=False),
        pa.field("is_truncated", pa.bool_(), nullable=False),
    ]
)
"""A sample keeps the columns of its prompt, so that one row can be rendered and judged."""

RENDERED = pa.schema(
    [
        *SAMPLE,
        pa.field("sample_rate_hz", pa.int32(), nullable=False),
        pa.field("golden_duration_s", pa.float32(), nullable=False),
        pa.field("waveform_pcm", pa.binary(), nullable=False),
        pa.field("reference_pcm", pa.binary(), nullable=False),
        pa.field("judge_errors", pa.string(), nullable=False),
    ]
)
"""A sample with its sound. Each judge then appends its own nullable float columns."""

NOT_RENDERED = "rendering: "
"""How `judge_errors` begins when a row has no sound through no fault of the policy."""

PAIR = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("policy_version", pa.int64(), nullable=False),
        pa.field("codec_fingerprint", pa.string(), nullable=False),
        pa.field("prompt_token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("chosen_token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("rejected_token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("margin", pa.float32(), nullable=False),
    ]
)

QUARANTINE = pa.schema(
    [
        pa.field("stage", pa.string(), nullable=False),
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)
"""Every row that a stage dropped, and why."""

Row = dict[str, Any]  # the cells of one Arrow row: their types are the schema's business


def pcm_from_waveform(waveform_N: NDArray[np.float32]) -> bytes:
    """Return 16-bit little-endian PCM; values beyond full scale are clipped."""
    return (np.clip(waveform_N, -1.0, 1.0) * 32767.0).astype("<i2").tobytes()


def waveform_from_pcm(pcm: bytes) -> NDArray[np.float32]:
    """Return samples in [-1, 1]; the inverse of `pcm_from_waveform` up to rounding."""
    return np.frombuffer(pcm, dtype="<i2").astype(np.float32) / 32767.0


def codes_from_flat(flat: Sequence[int], num_codebooks: int) -> NDArray[np.int16]:
    """Return codes_KT of a stored flat list."""
    return np.asarray(flat, dtype=np.int16).reshape(num_codebooks, -1)


def prompts_to_table(prompts: Iterable[Prompt]) -> pa.Table:
    """Write prompts."""
    return pa.Table.from_pylist([_prompt_columns(prompt) for prompt in prompts], schema=PROMPT)


def prompts_from_table(table: pa.Table) -> list[Prompt]:
    """Read prompts; extra columns are ignored."""
    return [prompt_from_row(row) for row in table.select(PROMPT.names).to_pylist()]


def prompt_from_row(row: Row) -> Prompt:
    """Read the prompt columns of one row."""
    return Prompt(
        prompt_id=row["prompt_id"],
        text=row["text"],
        phonemes=row["phonemes"],
        speaker_id=row["speaker_id"],
        speaker_codes_KT=codes_from_flat(row["speaker_codes"], row["num_codebooks"]),
        golden_codes_KT=codes_from_flat(row["golden_codes"], row["num_codebooks"]),
        codec_fingerprint=row["codec_fingerprint"],
    )


def samples_to_table(samples: Iterable[Sample], prompts: Mapping[str, Prompt]) -> pa.Table:
    """Write samples beside the columns of their prompts."""
    rows = [_prompt_columns(prompts[s.prompt_id]) | _sample_columns(s) for s in samples]
    return pa.Table.from_pylist(rows, schema=SAMPLE)


def sample_from_row(row: Row) -> Sample:
    """Read the sample columns of one row."""
    return Sample(
        prompt_id=row["prompt_id"],
        sample_index=row["sample_index"],
        policy_version=row["policy_version"],
        codec_fingerprint=row["codec_fingerprint"],
        prompt_token_ids=tuple(row["prompt_token_ids"]),
        token_ids=tuple(row["token_ids"]),
        logprobs=tuple(row["logprobs"]),
        temperature=row["temperature"],
        is_truncated=row["is_truncated"],
    )


def clip_from_row(row: Row) -> Clip:
    """Read what a judge needs of one rendered row."""
    return Clip(
        sample_id=f"{row['prompt_id']}/{row['sample_index']}",
        text=row["text"],
        waveform_N=waveform_from_pcm(row["waveform_pcm"]),
        reference_waveform_N=waveform_from_pcm(row["reference_pcm"]),
        sample_rate_hz=row["sample_rate_hz"],
        golden_duration_s=row["golden_duration_s"],
    )


def scored_from_row(row: Row, measures: Sequence[str], reward: Score) -> ScoredSample:
    """Read a judged row; a null measure is unmeasured for the reason in `judge_errors`."""
    errors = row.get("judge_errors", "")  # only a row that was rendered has the column
    return ScoredSample(
        sample=sample_from_row(row),
        measures={name: score_from_cell(row[name], errors) for name in measures},
        reward=reward,
    )


def score_from_cell(value: float | None, reason: str) -> Score:
    """Read one nullable cell."""
    return Unmeasured(reason or "no reason recorded") if value is None else Measured(value)


def pairs_to_table(pairs: Iterable[PreferencePair]) -> pa.Table:
    """Write pairs."""
    rows = [{name: getattr(pair, name) for name in PAIR.names} for pair in pairs]
    return pa.Table.from_pylist(rows, schema=PAIR)


def pairs_from_table(table: pa.Table) -> list[PreferencePair]:
    """Read pairs; a malformed one raises DataError."""
    return [_pair(row) for row in table.select(PAIR.names).to_pylist()]


def _pair(row: Row) -> PreferencePair:
    return PreferencePair(
        pair_id=row["pair_id"],
        kind=PairKind(row["kind"]),
        prompt_id=row["prompt_id"],
        policy_version=row["policy_version"],
        codec_fingerprint=row["codec_fingerprint"],
        prompt_token_ids=tuple(row["prompt_token_ids"]),
        chosen_token_ids=tuple(row["chosen_token_ids"]),
        rejected_token_ids=tuple(row["rejected_token_ids"]),
        margin=row["margin"],
    )


def _prompt_columns(prompt: Prompt) -> Row:
    return {
        "prompt_id": prompt.prompt_id,
        "text": prompt.text,
        "phonemes": prompt.phonemes,
        "speaker_id": prompt.speaker_id,
        "num_codebooks": len(prompt.speaker_codes_KT),
        "speaker_codes": prompt.speaker_codes_KT.reshape(-1),
        "golden_codes": prompt.golden_codes_KT.reshape(-1),
        "codec_fingerprint": prompt.codec_fingerprint,
    }


def _sample_columns(sample: Sample) -> Row:
    names = [name for name in SAMPLE.names if name not in PROMPT.names]
    return {name: getattr(sample, name) for name in names}
