"""Golden codec tokens in memory, as the supervised jobs read them."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from numpy.typing import NDArray

from speechalign.errors import ConfigError, DataError
from speechalign.rows import GOLDEN
from speechalign.seeds import derive_seed

CODEBOOK_SIZE = 1024
"""Of the AR and the NAR model, whatever the codec's own is; a smaller one fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenClip:
    """One clip of a golden table."""

    clip_id: str
    phonemes: str
    speaker_id: str
    codes_KT: NDArray[np.int16]


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenSet:
    """The clips of one split, and who speaks which."""

    clips: tuple[GoldenClip, ...]
    by_speaker: dict[str, tuple[int, ...]]
    codec_fingerprint: str

    def spread(self, count: int) -> list[int]:
        """Return up to `count` row indices, evenly over the table and so over its sources."""
        size = len(self.clips)
        return np.linspace(0, size - 1, min(count, size)).astype(int).tolist()

    def companion(self, index: int, min_frames: int, *seed: str | int) -> GoldenClip:
        """Return another clip of the same speaker, of at least `min_frames` frames.

        The clip itself is the answer when the speaker has no other.
        """
        clip = self.clips[index]
        others = [
            other
            for other in self.by_speaker[clip.speaker_id]
            if other != index and self.clips[other].codes_KT.shape[1] >= min_frames
        ]
        if not others:
            return clip
        return self.clips[others[derive_seed("companion", clip.clip_id, *seed) % len(others)]]


def read_golden(path: Path, split: str, *, min_frames: int) -> GoldenSet:
    """Read the transcribed clips of a split.

    Raises:
        ConfigError: there is no such file, or no clip of the split in it.
        DataError: clips of different codecs are mixed, or their codebooks are too large.
    """
    if not path.is_file():
        raise ConfigError(
            f"golden tokens {path} are no file; `speechalign prepare` makes one, golden.parquet in "
            "its output"
        )
    wanted = (ds.field("split") == split) & (ds.field("phonemes") != "")
    table = ds.dataset(path, schema=GOLDEN).to_table(filter=wanted)
    rows = table.drop_columns(["codes"]).to_pylist()
    codes = _codes(table)
    clips = tuple(
        GoldenClip(
            clip_id=row["clip_id"],
            phonemes=row["phonemes"],
            speaker_id=row["speaker_id"],
            codes_KT=flat.reshape(-1, row["num_frames"]),
        )
        for row, flat in zip(rows, codes, strict=True)
        if row["num_frames"] >= min_frames
    )
    if not clips:
        raise ConfigError(f"{path} has no transcribed clip of split {split!r} to train on")
    _check_codes(path, clips)
    fingerprints = sorted({row["codec_fingerprint"] for row in rows})
    if len(fingerprints) > 1:
        raise DataError(f"{path} mixes the codecs {fingerprints}; prepare all of it with one codec")
    by_speaker: dict[str, list[int]] = defaultdict(list)
    for index, clip in enumerate(clips):
        by_speaker[clip.speaker_id].append(index)
    return GoldenSet(
        clips=clips,
        by_speaker={speaker: tuple(found) for speaker, found in by_speaker.items()},
        codec_fingerprint=fingerprints[0],
    )


def _codes(table: pa.Table) -> list[NDArray[np.int16]]:
    """Return the flat codes of each row without a Python number for each code."""
    column: Any = table["codes"].combine_chunks()
    values, offsets = column.values.to_numpy(), column.offsets.to_numpy()
    return [values[first:stop].astype(np.int16) for first, stop in pairwise(offsets)]


def _check_codes(path: Path, clips: Sequence[GoldenClip]) -> None:
    """Refuse codes that would be read as another level's, or as letters."""
    highest = max(int(clip.codes_KT.max()) for clip in clips)
    if highest >= CODEBOOK_SIZE:
        raise DataError(
            f"{path} has code {highest}, a model learns codes below {CODEBOOK_SIZE}; prepare the "
            "data with a codec of smaller codebooks"
        )
