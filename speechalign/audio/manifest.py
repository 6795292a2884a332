"""Lists of recordings: manifests, and the corpora as users have them on disk. Pure."""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import pyarrow.parquet as pq

from speechalign.config.prepare import InputConfig
from speechalign.errors import ConfigError, DataError
from speechalign.seeds import derive_seed

REQUIRED = ("path", "text", "speaker")
SPLITS = ("train", "heldout")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """One line of a manifest."""

    clip_id: str
    path: Path
    text: str
    speaker_id: str
    split: Literal["train", "heldout"] | None = None
    """What the manifest says; without it the speakers decide."""


def read_recordings(config: InputConfig) -> list[Recording]:
    """Return the recordings of a manifest or a corpus, ids unique.

    Raises:
        ConfigError: the path does not exist, or is not of the kind it should be.
        DataError: an id appears twice, or there is nothing.
    """
    if not config.path.exists():
        raise ConfigError(f"input.path {config.path} does not exist")
    readers: dict[str, Callable[[Path], Iterator[Recording]]] = {
        "manifest": _manifest,
        "librispeech": _librispeech,
        "libritts": _libritts,
        "vctk": _vctk,
        "ljspeech": _ljspeech,
    }
    recordings = list(readers[config.kind](config.path))
    if not recordings:
        raise DataError(f"no recording of a {config.kind} layout was found under {config.path}")
    twice = [id_ for id_, count in Counter(r.clip_id for r in recordings).items() if count > 1]
    if twice:
        raise DataError(f"{config.path}: {len(twice)} ids appear twice, first {twice[0]!r}")
    return recordings


def split_of(recording: Recording, num_speakers: int, heldout_share: float, seed: int) -> str:
    """Return `train` or `heldout`; all recordings of a speaker are on one side.

    With a single speaker the recordings themselves are split. A split that the manifest names
    is kept as it is.
    """
    if recording.split is not None:
        return recording.split
    subject = recording.speaker_id if num_speakers > 1 else recording.clip_id
    is_heldout = derive_seed(seed, "split", subject) % 10_000 < heldout_share * 10_000
    return "heldout" if is_heldout else "train"


def _manifest(path: Path) -> Iterator[Recording]:
    rows = _rows(path)
    for number, row in enumerate(rows, start=1):
        _check_row(f"{path}, row {number}", row)
        audio = Path(str(row["path"]))
        yield Recording(
            clip_id=str(row.get("id") or row["path"]),
            path=audio if audio.is_absolute() else path.parent / audio,
            text="" if row["text"] is None else str(row["text"]),  # left out later, with a reason
            speaker_id=str(row["speaker"]),
            split=cast(Literal["train", "heldout"] | None, row.get("split") or None),
        )


def _check_row(where: str, row: Any) -> None:
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: not an object with path, text, speaker")
    missing = [name for name in REQUIRED if name not in row]
    missing += [name for name in ("path", "speaker") if name in row and not row[name]]
    if missing:
        raise ConfigError(f"{where}: no {', '.join(missing)}; a manifest has path, text, speaker")
    if None in row:  # where the csv module puts cells without a column
        raise ConfigError(f"{where}: more cells than columns; quote texts that have commas")
    if row.get("split") and row["split"] not in SPLITS:
        raise ConfigError(f"{where}: split {row['split']!r} is neither train nor heldout")


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        match path.suffix.lower():
            case ".jsonl":
                lines = path.read_text(encoding="utf-8-sig").split("\n")
                return [json.loads(line) for line in lines if line.strip()]
            case ".csv":
                with path.open(newline="", encoding="utf-8-sig") as file:
                    return list(csv.DictReader(file))
            case ".parquet":
                return pq.read_table(path).to_pylist()
            case other:
                raise ConfigError(f"{path}: a manifest is .jsonl, .csv or .parquet, not {other!r}")
    except (ValueError, OSError, csv.Error) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} cannot be read as a manifest: {error}") from None


def _librispeech(root: Path) -> Iterator[Recording]:
    for transcript in sorted(root.rglob("*.trans.txt")):
        for line in filter(None, _text_of(transcript).splitlines()):
            clip_id, _, text = line.partition(" ")
            path = transcript.parent / f"{clip_id}.flac"
            speaker = clip_id.partition("-")[0]
            yield Recording(clip_id=clip_id, path=path, text=text, speaker_id=speaker)


def _libritts(root: Path) -> Iterator[Recording]:
    for transcript in sorted(root.rglob("*.normalized.txt")):
        clip_id = transcript.name.removesuffix(".normalized.txt")
        yield Recording(
            clip_id=clip_id,
            path=transcript.with_name(f"{clip_id}.wav"),
            text=_text_of(transcript).strip(),
            speaker_id=clip_id.partition("_")[0],
        )


def _vctk(root: Path) -> Iterator[Recording]:
    for transcript in sorted((root / "txt").glob("*/*.txt")):
        speaker, clip_id = transcript.parent.name, transcript.stem
        folders = (root / "wav48_silence_trimmed" / speaker, root / "wav48" / speaker)
        names = (f"{clip_id}_mic1.flac", f"{clip_id}.wav")
        paths = [folder / name for folder in folders for name in names]
        yield Recording(
            clip_id=clip_id,
            path=next((path for path in paths if path.exists()), paths[0]),
            text=_text_of(transcript).strip(),
            speaker_id=speaker,
        )


def _ljspeech(root: Path) -> Iterator[Recording]:
    metadata = root / "metadata.csv"
    if not metadata.exists():
        return
    for line in _text_of(metadata).splitlines():
        clip_id, *texts = line.split("|")
        if texts:
            path = root / "wavs" / f"{clip_id}.wav"
            yield Recording(clip_id=clip_id, path=path, text=texts[-1], speaker_id="ljspeech")


def _text_of(path: Path) -> str:
    """Return a transcript; a byte that is not UTF-8 becomes a character that is refused later."""
    return path.read_text(encoding="utf-8", errors="replace")
