"""Recordings of every source -> trimmed clips, pseudo-speakers, one array of samples.

    <output>/wave.npy        int16, all clips one after the other, 16 kHz
    <output>/clips.parquet   what each stretch of it is

Resampling a clip moves pitch and formants together: a new, clean speaker for nothing. A
pseudo-speaker is in the split of the clip that it is made of.
"""

import logging
import multiprocessing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soxr
from numpy.typing import NDArray

from speechalign.config.corpus import CorpusConfig
from speechalign.corpus import sources
from speechalign.corpus.grammar import sentences
from speechalign.corpus.sources import SAMPLE_RATE_HZ, Recording
from speechalign.seeds import derive_seed

logger = logging.getLogger(__name__)

CODEC_FRAME_SAMPLES = 320
EDGE_SILENCE_SAMPLES = 1280
"""80 ms of the silence around the speech stay."""
SILENCE_BELOW_PEAK = 0.01
HIBARI_RATE_HZ = 24000


def build_corpus(config: CorpusConfig) -> Path:
    """Write clips and features; finished parts are kept. Return the folder."""
    from speechalign.corpus.features import write_features

    if not (config.output / "clips.parquet").exists():
        _write_clips(config)
    write_features(config)
    return config.output


def trim(waveform_N: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cut the silence around the speech, and the tail that is no whole codec frame."""
    loud = np.flatnonzero(np.abs(waveform_N) > SILENCE_BELOW_PEAK * np.abs(waveform_N).max())
    first = max(0, loud[0] - EDGE_SILENCE_SAMPLES)
    speech = waveform_N[first : loud[-1] + EDGE_SILENCE_SAMPLES]
    return speech[: len(speech) // CODEC_FRAME_SAMPLES * CODEC_FRAME_SAMPLES]


def pseudo_speaker(recording: Recording, factor: float, suffix: str) -> Recording:
    """Return the recording slowed down and lowered by a factor above one, or raised below it."""
    wave = soxr.resample(recording.waveform_N, SAMPLE_RATE_HZ, SAMPLE_RATE_HZ * factor)
    return replace(
        recording,
        clip_id=f"{recording.clip_id}-{suffix}",
        speaker_id=f"{recording.speaker_id}-{suffix}",
        waveform_N=np.asarray(wave, dtype=np.float32),
    )


def _write_clips(config: CorpusConfig) -> None:
    from hibari import Hibari

    config.output.mkdir(parents=True, exist_ok=True)
    phonemize = Hibari().phonemize
    rows: list[dict[str, object]] = []
    waves: list[NDArray[np.int16]] = []
    start = 0
    for recording in _recordings(config):
        wave = trim(recording.waveform_N)
        waves.append((np.clip(wave, -1, 1) * 32767).astype(np.int16))
        phonemes = phonemize(recording.text) if recording.text else ""
        rows.append(
            {
                "clip_id": recording.clip_id,
                "text": recording.text,
                "phonemes": phonemes if isinstance(phonemes, str) else "".join(phonemes),
                "speaker_id": recording.speaker_id,
                "source": recording.source,
                "kind": recording.kind,
                "split": recording.split,
                "start": start,
                "num_samples": len(wave),
                "num_frames": len(wave) // CODEC_FRAME_SAMPLES,
            }
        )
        start += len(wave)
        if len(rows) % 1000 == 0:
            logger.info("%d clips, %.2f h", len(rows), start / SAMPLE_RATE_HZ / 3600)
    np.save(config.output / "wave.npy", np.concatenate(waves))
    partial = config.output / ".clips.parquet"
    pq.write_table(pa.Table.from_pylist(rows), partial)
    partial.replace(config.output / "clips.parquet")
    logger.info("%d clips, %.2f h", len(rows), start / SAMPLE_RATE_HZ / 3600)


def _recordings(config: CorpusConfig) -> Iterator[Recording]:
    folder = config.output / "packages"
    seed = config.seed
    for recording in sources.asterisk_english(folder, config.num_heldout_human, seed):
        yield recording
        if recording.split == "train":
            yield replace(pseudo_speaker(recording, 0.88, "a"), text="")
            yield replace(pseudo_speaker(recording, 1.12, "b"), text="")
    for language in config.foreign_languages:
        minutes = config.foreign_minutes
        for recording in sources.asterisk_foreign(folder, language, minutes, seed):
            yield recording
            index = derive_seed(seed, "factor", recording.clip_id) % 2
            yield pseudo_speaker(recording, (0.87, 1.13)[index], "ab"[index])
    yield from sources.librivox(folder)
    hibari_texts, flite_texts = script(config)
    for voice, texts in flite_texts.items():
        yield from sources.flite(folder, voice, texts)
    yield from _hibari(config, hibari_texts)


def script(config: CorpusConfig) -> tuple[list[str], dict[str, list[str]]]:
    """Return the sentences of hibari, training first, and of each flite voice: all distinct.

    One draw serves everybody, so that no voice can speak a held-out sentence in training.
    """
    num_hibari = config.num_train_sentences + config.num_heldout_sentences
    each = config.num_flite_sentences
    texts = sentences(num_hibari + each * len(config.flite_voices), config.seed)
    starts = range(num_hibari, len(texts), each) if each else ()
    flite_texts = {
        voice: texts[start : start + each]
        for voice, start in zip(config.flite_voices, starts, strict=False)
    }
    return texts[:num_hibari], flite_texts


def _hibari(config: CorpusConfig, texts: list[str]) -> Iterator[Recording]:
    jobs: list[tuple[int, str, str, str, float]] = []
    for index, text in enumerate(texts):
        split = "train" if index < config.num_train_sentences else "heldout"
        factors = config.train_factors if split == "train" else config.heldout_factors
        voice = index % len(factors)
        speaker = f"hibari-{split[0]}{voice:02d}"
        jobs.append((index, text, split, speaker, factors[voice]))
    context = multiprocessing.get_context("spawn")  # a fork after torch threads hangs
    with context.Pool(config.num_processes, initializer=_load_hibari) as pool:
        yield from pool.imap(_speak, jobs, chunksize=64)


def _load_hibari() -> None:
    global _hibari_voice
    from hibari import Hibari

    _hibari_voice = Hibari()


def _speak(job: tuple[int, str, str, str, float]) -> Recording:
    index, text, split, speaker, factor = job
    wave = np.asarray(_hibari_voice(text), dtype=np.float32).reshape(-1)
    return Recording(
        clip_id=f"hibari/{index:05d}",
        text=text,
        speaker_id=speaker,
        source="hibari-tts",
        kind="synthetic",
        split=split,
        waveform_N=np.asarray(
            soxr.resample(wave, HIBARI_RATE_HZ, SAMPLE_RATE_HZ * factor), dtype=np.float32
        ),
    )
