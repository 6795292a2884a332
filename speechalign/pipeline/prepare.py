"""`speechalign prepare`: recordings -> Ray Data actors -> golden codec tokens and a quarantine."""

import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from speechalign.artifacts import (
    committed_folder,
    is_committed,
    manifest_facts,
    refuse_foreign,
    verify_folder,
)
from speechalign.audio.decode import read_speech
from speechalign.audio.manifest import Recording, read_recordings, split_of
from speechalign.codec.build import build_codec
from speechalign.config.codec import CodecConfig
from speechalign.config.load import config_hash
from speechalign.config.prepare import AudioLimits, PrepareConfig
from speechalign.config.sampling import PoolConfig
from speechalign.errors import ConfigError, DataError
from speechalign.locks import held_output
from speechalign.pipeline.cluster import connected
from speechalign.policy.text import TextFrontend
from speechalign.rows import GOLDEN, QUARANTINE, Row
from speechalign.sampling.pipeline import Stage, errors_of_actors, stream

logger = logging.getLogger(__name__)

MADE_BY = "config_hash"
GOLDEN_FILE, QUARANTINE_FILE = "golden.parquet", "quarantine.parquet"
ERROR = "error"
PREPARED = pa.schema([*GOLDEN, pa.field(ERROR, pa.string(), nullable=False)])
"""A row that failed has empty codes and says why."""


class EncodeStage:
    """A plain class: tests call it directly, Ray Data makes actors of it."""

    def __init__(self, codec: CodecConfig, limits: AudioLimits) -> None:
        self._codec = build_codec(codec)
        self._limits = limits
        self._text = TextFrontend()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Decode, resample and encode; a bad recording is a row with a reason, not an error."""
        rows = [self._encode(row) for row in batch.to_pylist()]
        return pa.Table.from_pylist(rows, schema=PREPARED)

    def _encode(self, row: Row) -> Row:
        empty = {"phonemes": "", "num_frames": 0, "codes": [], ERROR: ""}
        named = {"clip_id": row["clip_id"], "text": row["text"], "speaker_id": row["speaker_id"]}
        named |= {"source": "user", "kind": "human", "split": row["split"]}
        named |= {"codec_fingerprint": self._codec.fingerprint}
        try:
            phonemes = self._text.phonemize(row["text"])
            wave_N = read_speech(Path(row["path"]), self._codec.sample_rate_hz, self._limits)
            codes_KT = self._codec.encode(wave_N)
        except DataError as error:
            return named | empty | {ERROR: str(error)}
        num_frames = codes_KT.shape[1]
        codes = codes_KT.astype("int16").reshape(-1)
        return named | {"phonemes": phonemes, "num_frames": num_frames, "codes": codes, ERROR: ""}


def run_prepare(config: PrepareConfig) -> str:
    """Write the golden tokens of a corpus; return what came of it, in words.

    Raises:
        ConfigError: the input or the codec cannot be read, the cluster is too small, or the output
            is something else, perhaps of other settings.
        DataError: not one recording was usable; the reasons are in the message.
        EngineDead: an actor died once too often.
        RunLocked: another process writes there.
    """
    if not is_committed(config.output):
        with held_output(config.output):
            _prepare(config)
    if verify_folder(config.output).get(MADE_BY) != _made_by(config):
        raise ConfigError(
            f"{config.output} was made of another input or with other settings; name another "
            "output, or remove it"
        )
    return _in_words(config.output)


def _prepare(config: PrepareConfig) -> None:
    refuse_foreign(config.output)
    recordings = read_recordings(config.input)
    facts: dict[str, Any] = {"kind": "golden", MADE_BY: _made_by(config)}
    with connected(), committed_folder(config.output, facts) as partial:
        prepared = _encode_all(config, recordings)
        facts |= _write(prepared, partial)


def _made_by(config: PrepareConfig) -> str:
    return config_hash(config.model_copy(update={"output": Path(), "pool": PoolConfig()}))


def _encode_all(config: PrepareConfig, recordings: list[Recording]) -> pa.Table:
    num_speakers = len({recording.speaker_id for recording in recordings})
    rows = [
        {
            "clip_id": recording.clip_id,
            "path": str(recording.path),
            "text": recording.text,
            "speaker_id": recording.speaker_id,
            "split": split_of(recording, num_speakers, config.heldout_share, config.seed),
        }
        for recording in recordings
    ]
    arguments = {"codec": config.codec, "limits": config.limits}
    stages = [Stage(name="encode", stage=EncodeStage, arguments=arguments, pool=config.pool)]
    dataset = stream(pa.Table.from_pylist(rows), stages)
    batches: Iterable[Any] = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    with errors_of_actors(stages):
        return pa.concat_tables([batch.cast(PREPARED) for batch in batches])


def _write(prepared: pa.Table, folder: Path) -> dict[str, Any]:
    is_good = pc.equal(prepared[ERROR], pa.scalar(""))
    golden = prepared.filter(is_good).drop_columns([ERROR]).cast(GOLDEN)
    bad = prepared.filter(pc.invert(is_good)).select(["clip_id", ERROR]).to_pylist()
    reasons = Counter(_without_path(row[ERROR]) for row in bad)
    if not golden.num_rows:
        raise DataError(
            f"not one of {len(bad)} recordings can be used: {dict(reasons.most_common(5))}"
        )
    quarantine = [
        {"stage": "prepare", "row_id": row["clip_id"], "reason": row[ERROR]} for row in bad
    ]
    pq.write_table(golden, folder / GOLDEN_FILE, compression="zstd")
    pq.write_table(pa.Table.from_pylist(quarantine, schema=QUARANTINE), folder / QUARANTINE_FILE)
    return {
        "num_clips": golden.num_rows,
        "num_quarantined": len(bad),
        "reasons": dict(reasons),
        "splits": dict(Counter(golden["split"].to_pylist())),
        "codec_fingerprint": golden["codec_fingerprint"][0].as_py(),
    }


def _without_path(reason: str) -> str:
    """Return a reason that files share: the part after the path, numbers left out."""
    text = reason.rpartition(": ")[2]
    return "".join("#" if character.isdigit() else character for character in text)


def _in_words(folder: Path) -> str:
    facts = manifest_facts(folder)
    lines = [f"{folder / GOLDEN_FILE}: {facts['num_clips']} clips, {facts['splits']}"]
    lines.append(f"{folder / QUARANTINE_FILE}: {facts['num_quarantined']} recordings left out")
    lines += [f"  {count} x {reason}" for reason, count in facts["reasons"].items()]
    return "\n".join(lines)
