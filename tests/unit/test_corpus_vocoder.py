import numpy as np
import pytest

from speechalign.codec.vocoder import NUM_FEATURES, analyse, synthesise


def buzz(num_samples: int, f0_hz: float = 150.0) -> np.ndarray:
    times_s = np.arange(num_samples) / 16000
    harmonics = [np.sin(2 * np.pi * f0_hz * k * times_s) / k for k in range(1, 20)]
    return (0.2 * np.sum(harmonics, axis=0)).astype(np.float32)


@pytest.mark.parametrize(("num_samples", "num_codec_frames"), [(6400, 20), (6719, 20), (6720, 21)])
def test_two_feature_frames_make_a_codec_frame(num_samples: int, num_codec_frames: int):
    features = analyse(buzz(num_samples))
    assert features.shape == (2 * num_codec_frames, NUM_FEATURES)
    assert features.dtype == np.float32
    wave = synthesise(features)
    assert wave.shape == (320 * num_codec_frames,)
    assert wave.dtype == np.float32


def test_pitch_survives_analysis_and_synthesis():
    features = analyse(synthesise(analyse(buzz(16000))))
    voiced = features[:, 1] > 0.5
    assert voiced[20:80].all()
    assert np.exp(np.median(features[20:80, 0])) == pytest.approx(150, rel=0.02)


def test_silence_is_unvoiced_and_finite():
    features = analyse(np.zeros(3200, np.float32))
    assert not features[:, 1].any()
    assert np.isfinite(features).all()
    assert np.abs(synthesise(features)).max() < 0.01
