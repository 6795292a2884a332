"""The corpus that the codec learns from, and crops drawn from it.

Shapes: B batch, F frames of 10 ms, T frames of 20 ms, D dims, C clips.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from speechalign.codec.embedded_model import FRAMES_PER_CODE
from speechalign.errors import CorruptArtifact, DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Clips and their features, concatenated in the order of the clips."""

    clips: pa.Table
    features_FD: NDArray[np.float32]
    teacher_TD: NDArray[np.float16]
    num_frames_C: NDArray[np.int64]
    """In frames of 20 ms."""
    starts_C: NDArray[np.int64]
    """In frames of 20 ms."""

    @classmethod
    def read(cls, corpus_dir: Path) -> "Corpus":
        """Open the corpus of a directory; features stay on disk until they are used.

        Raises:
            CorruptArtifact: if the arrays are not as long as the clips say.
        """
        clips = pq.read_table(corpus_dir / "clips.parquet")
        features_FD = np.load(corpus_dir / "world.npy", mmap_mode="r")
        teacher_TD = np.load(corpus_dir / "whisper.npy", mmap_mode="r")
        num_frames_C = clips["num_frames"].to_numpy().astype(np.int64)
        total = int(num_frames_C.sum())
        if len(features_FD) != FRAMES_PER_CODE * total or len(teacher_TD) != total:
            raise CorruptArtifact(
                f"{corpus_dir}: the clips have {total} frames of 20 ms, world.npy has "
                f"{len(features_FD)} of 10 ms and whisper.npy {len(teacher_TD)}; make it anew"
            )
        return cls(
            clips=clips,
            features_FD=features_FD,
            teacher_TD=teacher_TD,
            num_frames_C=num_frames_C,
            starts_C=np.concatenate([[0], np.cumsum(num_frames_C)[:-1]]),
        )

    def clip_features(self, clip: int) -> NDArray[np.float32]:
        """Return features_FD of one clip."""
        start, length = int(self.starts_C[clip]), int(self.num_frames_C[clip])
        return np.asarray(
            self.features_FD[FRAMES_PER_CODE * start : FRAMES_PER_CODE * (start + length)]
        )


@dataclass(frozen=True, slots=True)
class CropBatch:
    """Crops of equal length."""

    features_BFD: Tensor
    teacher_BTD: Tensor


class CropSampler:
    """Draws crops of training clips; rare sources more often than their minutes say.

    A clip shorter than a crop is followed by another of its source, so no crop ever reaches
    into a clip that is not for training.
    """

    def __init__(
        self, corpus: Corpus, *, crop_frames: int, power: float, rng: np.random.Generator
    ) -> None:
        self._corpus, self._crop_frames, self._rng = corpus, crop_frames, rng
        is_train_C = np.array([split == "train" for split in corpus.clips["split"].to_pylist()])
        if not is_train_C.any():
            raise DataError("the corpus has no clip whose split is train; check clips.parquet")
        source_C = np.array(corpus.clips["source"].to_pylist())
        names = sorted(set(source_C[is_train_C].tolist()))
        self._clips = [np.flatnonzero(is_train_C & (source_C == name)) for name in names]
        minutes = np.array([corpus.num_frames_C[clips].sum() for clips in self._clips])
        self.share = dict(zip(names, (minutes**power / (minutes**power).sum()), strict=True))
        self._ends = [np.cumsum(corpus.num_frames_C[clips]) for clips in self._clips]

    def draw(self, batch_size: int) -> CropBatch:
        """Return a batch of crops."""
        frames_BT = np.stack([self._crop() for _ in range(batch_size)])
        pairs_BF = FRAMES_PER_CODE * np.repeat(frames_BT, FRAMES_PER_CODE, axis=1)
        pairs_BF += np.tile(np.arange(FRAMES_PER_CODE), self._crop_frames)
        features_BFD = self._corpus.features_FD[pairs_BF].astype(np.float32)
        teacher_BTD = self._corpus.teacher_TD[frames_BT].astype(np.float32)
        return CropBatch(torch.from_numpy(features_BFD), torch.from_numpy(teacher_BTD))

    def _crop(self) -> NDArray[np.int64]:
        source = self._rng.choice(len(self._clips), p=list(self.share.values()))
        pieces, missing = [], self._crop_frames
        while missing:
            clip = self._draw_clip(int(source))
            start, length = self._corpus.starts_C[clip], self._corpus.num_frames_C[clip]
            take = int(min(length, missing))
            first = start + self._rng.integers(0, length - take + 1)
            pieces.append(np.arange(first, first + take))
            missing -= take
        return np.concatenate(pieces)

    def _draw_clip(self, source: int) -> int:
        ends = self._ends[source]
        drawn = np.searchsorted(ends, self._rng.integers(0, ends[-1]), side="right")
        return int(self._clips[source][drawn])


def equal_length_batches(
    num_frames_C: NDArray[np.int64], *, max_frames: int = 6000
) -> list[NDArray[np.int64]]:
    """Return batches of clips of one length each, so that batching needs no padding.

    The codes of a clip are then what they are when it is encoded alone.
    """
    batches: list[NDArray[np.int64]] = []
    for length in np.unique(num_frames_C[num_frames_C > 0]).tolist():
        clips = np.flatnonzero(num_frames_C == length)
        size = max(1, max_frames // length)
        batches.extend(clips[i : i + size] for i in range(0, len(clips), size))
    return batches
