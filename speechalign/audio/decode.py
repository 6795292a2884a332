"""A file on disk to a waveform that a codec can encode, or the reason why not.

The header is read before the samples: 43 kB of FLAC can hold 57 MB of silence.
"""

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile as sf
import soxr
from numpy.typing import NDArray

from speechalign.config.prepare import AudioLimits
from speechalign.errors import DataError

FEWER_FRAMES_ALLOWED = 0.98
"""A file that was cut decodes fewer frames than its header declares."""
STREAMED_BYTES = 0x7FFFF000
"""Writers that cannot go back to the header declare no data, or as many bytes as they can."""


def read_speech(path: Path, sample_rate_hz: int, limits: AudioLimits) -> NDArray[np.float32]:
    """Return the mono waveform at a rate.

    Raises:
        DataError: the file is not speech that can be used; the message says why.
    """
    try:
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        if path.suffix.lower() == ".raw":
            raise DataError(f"{path}: samples without a header; store them as WAV or FLAC")
        with path.open("rb") as file:
            return decode_speech(file, str(path), sample_rate_hz, limits)
    except OSError as error:  # not ours to read, or a disk that fails: of this file alone
        raise DataError(f"{path}: {error.strerror or error}") from None


def decode_speech(
    file: BinaryIO, name: str, sample_rate_hz: int, limits: AudioLimits
) -> NDArray[np.float32]:
    """Return the mono waveform of an open file at a rate.

    Args:
        file: seekable, at its start.
        name: of the file, in messages.
        sample_rate_hz: of the waveform.
        limits: what the file may be.

    Raises:
        DataError: the file is not speech that can be used; the message says why.
    """
    try:
        _check_wav_is_whole(file, name)
        file.seek(0)
        header = sf.info(file)
        _check_header(name, header, limits)
        file.seek(0)
        samples_NC, rate_hz = sf.read(file, dtype="float32", always_2d=True)
    except sf.LibsndfileError as error:
        raise DataError(f"{name}: not decodable audio ({error.error_string})") from None
    if len(samples_NC) < FEWER_FRAMES_ALLOWED * header.frames:
        raise DataError(f"{name}: {len(samples_NC)} of {header.frames} declared frames; it was cut")
    wave_N = samples_NC.mean(axis=1)
    _check_samples(name, wave_N, limits)
    resampled_N = soxr.resample(wave_N, rate_hz, sample_rate_hz)
    return np.ascontiguousarray(resampled_N, dtype=np.float32)


def _check_header(name: str, header: Any, limits: AudioLimits) -> None:
    if not limits.min_sample_rate_hz <= header.samplerate <= limits.max_sample_rate_hz:
        raise DataError(
            f"{name}: {header.samplerate} Hz is outside {limits.min_sample_rate_hz} to "
            f"{limits.max_sample_rate_hz} Hz"
        )
    if header.channels > limits.max_channels:
        raise DataError(f"{name}: {header.channels} channels, at most {limits.max_channels}")
    duration_s = header.frames / header.samplerate
    if not limits.min_duration_s <= duration_s <= limits.max_duration_s:
        raise DataError(
            f"{name}: {duration_s:.2f} s is outside {limits.min_duration_s} to "
            f"{limits.max_duration_s} s"
        )


def _check_samples(name: str, wave_N: NDArray[np.float32], limits: AudioLimits) -> None:
    if not np.isfinite(wave_N).all():
        raise DataError(f"{name}: samples that are not finite numbers")
    peak = float(np.abs(wave_N).max())
    if peak > limits.max_peak:
        raise DataError(f"{name}: peak {peak:.1f}, at most {limits.max_peak}; scale it to 1")
    swing = float(np.abs(wave_N - wave_N.mean()).max())  # a constant offset is not sound
    if swing < limits.min_peak:
        raise DataError(f"{name}: silence (peak {swing:.1e})")


def _check_wav_is_whole(file: BinaryIO, name: str) -> None:
    """Refuse a WAV that is shorter than its data chunk; libsndfile trusts the file's size."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    riff = file.read(12)
    if riff[:4] != b"RIFF" or riff[8:] != b"WAVE":
        return
    while len(head := file.read(8)) == 8:
        declared = int.from_bytes(head[4:], "little")
        if head[:4] == b"data":
            break
        file.seek(declared + declared % 2, os.SEEK_CUR)
    else:
        return  # no data chunk: libsndfile says so
    present = size - file.tell()
    if declared < STREAMED_BYTES and present < FEWER_FRAMES_ALLOWED * declared:
        raise DataError(f"{name}: {present} of {declared} declared bytes; it was cut")
