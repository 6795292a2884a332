"""WORLD analysis and synthesis: the signal half of the embedded codec.

F0 is searched every 2.5 ms and kept every 10 ms: on four hibari clips that lifts DistillMOS of
the vocoder alone from 2.94 to 3.43, for a tenth of the cost of the Harvest search (3.54).

Shapes: N samples, F feature frames of 10 ms, D = 43 features: log-F0 (interpolated through
unvoiced frames), voicing (0 or 1), 40 envelope coefficients, 1 aperiodicity in dB.
"""

from typing import Any

import numpy as np
import pyworld as _untyped_pyworld
from numpy.typing import NDArray

pyworld: Any = _untyped_pyworld  # a compiled module without stubs
SAMPLE_RATE_HZ = 16000
FRAME_PERIOD_MS = 10.0
SEARCH_PERIOD_MS = 2.5
NUM_ENVELOPE = 40
NUM_FEATURES = 2 + NUM_ENVELOPE + 1
CODEC_FRAME_SAMPLES = 320
"""20 ms: two feature frames make one codec frame."""
FFT_SIZE = 1024
UNVOICED_LOG_F0 = 5.0
MIN_F0_HZ, MAX_F0_HZ = 60.0, 500.0


def analyse(waveform_N: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return features_FD of a 16 kHz waveform, F = 2 * (N // 320)."""
    wave = np.ascontiguousarray(waveform_N, dtype=np.float64)
    f0, times_s = _f0(wave)
    envelope = pyworld.code_spectral_envelope(
        pyworld.cheaptrick(wave, f0, times_s, SAMPLE_RATE_HZ), SAMPLE_RATE_HZ, NUM_ENVELOPE
    )
    aperiodicity = pyworld.code_aperiodicity(
        pyworld.d4c(wave, f0, times_s, SAMPLE_RATE_HZ), SAMPLE_RATE_HZ
    )
    voicing = f0 > 0
    features = np.column_stack([_log_f0(f0, voicing), voicing, envelope, aperiodicity])
    return _fit(features.astype(np.float32), 2 * (len(wave) // CODEC_FRAME_SAMPLES))


def synthesise(features_FD: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the 16 kHz waveform of features_FD, N = 160 * F."""
    features = features_FD.astype(np.float64)
    f0 = np.where(features[:, 1] > 0.5, np.exp(features[:, 0]), 0.0)
    envelope = pyworld.decode_spectral_envelope(
        np.ascontiguousarray(features[:, 2:-1]), SAMPLE_RATE_HZ, FFT_SIZE
    )
    aperiodicity = pyworld.decode_aperiodicity(
        np.ascontiguousarray(np.minimum(features[:, -1:], 0.0)), SAMPLE_RATE_HZ, FFT_SIZE
    )
    wave = pyworld.synthesize(f0, envelope, aperiodicity, SAMPLE_RATE_HZ, FRAME_PERIOD_MS)
    num_samples = len(features) * CODEC_FRAME_SAMPLES // 2
    return _fit(wave[:, None].astype(np.float32), num_samples)[:, 0]


def _f0(wave: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    f0, times_s = pyworld.dio(
        wave, SAMPLE_RATE_HZ, f0_floor=MIN_F0_HZ, f0_ceil=MAX_F0_HZ, frame_period=SEARCH_PERIOD_MS
    )
    step = round(FRAME_PERIOD_MS / SEARCH_PERIOD_MS)
    f0, times_s = f0[::step].copy(), times_s[::step].copy()
    return pyworld.stonemask(wave, f0, times_s, SAMPLE_RATE_HZ), times_s


def _log_f0(f0: NDArray[np.float64], voicing: NDArray[np.bool_]) -> NDArray[np.float64]:
    if not voicing.any():
        return np.full(len(f0), UNVOICED_LOG_F0)
    voiced = np.flatnonzero(voicing)
    return np.interp(np.arange(len(f0)), voiced, np.log(f0[voiced]))


def _fit(rows: NDArray[np.float32], num_rows: int) -> NDArray[np.float32]:
    """Cut, or repeat the last row, to a number of rows."""
    missing = num_rows - len(rows)
    return np.pad(rows, ((0, missing), (0, 0)), mode="edge") if missing > 0 else rows[:num_rows]
