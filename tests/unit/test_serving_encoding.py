"""Every format can be decoded, and is as long as it should be."""

import io
from typing import get_args

import av
import numpy as np
import pytest
import soundfile as sf
from numpy.typing import NDArray

from speechalign.config.serving import AudioFormat
from speechalign.serving.encoding import (
    CONTAINERS,
    Tempo,
    build_encoder,
    is_sent_whole,
    media_type,
)

RATE_HZ = 16_000
NUM_SAMPLES = 2 * RATE_HZ + 123
WAVE_N = (0.3 * np.sin(2 * np.pi * 220 * np.arange(NUM_SAMPLES) / RATE_HZ)).astype(np.float32)


def encoded(audio_format: AudioFormat, *, whole: bool) -> list[bytes]:
    encoder = build_encoder(audio_format, RATE_HZ, pcm_sample_rate_hz=24_000, whole=whole)
    parts = [encoder.encode(WAVE_N[at : at + 5000]) for at in range(0, NUM_SAMPLES, 5000)]
    return [*parts, encoder.finish()]


def decoded(data: bytes) -> NDArray[np.float64]:
    with av.open(io.BytesIO(data), "r") as container:
        frames = [frame.to_ndarray() for frame in container.decode(audio=0)]
    return np.concatenate(frames, axis=1)[0]


@pytest.mark.parametrize("audio_format", ["wav", "opus", "mp3", "flac"])
def test_a_whole_file_is_exact_to_the_sample(audio_format: AudioFormat):
    samples_N, rate_hz = sf.read(io.BytesIO(b"".join(encoded(audio_format, whole=True))))
    assert (len(samples_N), rate_hz) == (NUM_SAMPLES, RATE_HZ)
    assert np.corrcoef(samples_N, WAVE_N)[0, 1] > 0.99


@pytest.mark.parametrize("audio_format", ["wav", "opus"])
def test_a_streamed_file_is_exact_to_the_sample(audio_format: AudioFormat):
    parts = encoded(audio_format, whole=False)
    assert sum(1 for part in parts[:-1] if part) > 3
    samples_N, _ = sf.read(io.BytesIO(b"".join(parts)))
    assert len(samples_N) == NUM_SAMPLES


def test_streamed_flac_has_all_samples_though_its_header_does_not_know_how_many():
    parts = encoded("flac", whole=False)
    assert len(decoded(b"".join(parts))) == NUM_SAMPLES


def test_streamed_mp3_is_longer_by_the_padding_of_its_encoder():
    samples_N, _ = sf.read(io.BytesIO(b"".join(encoded("mp3", whole=False))))
    assert 0 < len(samples_N) - NUM_SAMPLES < 2_304


def test_aac_is_padded_to_frames_of_1024_samples():
    length = len(decoded(b"".join(encoded("aac", whole=False))))
    assert length % 1024 == 0
    assert NUM_SAMPLES <= length < NUM_SAMPLES + 2_048


def test_pcm_is_resampled_to_the_rate_that_its_media_type_says():
    samples_N = np.frombuffer(b"".join(encoded("pcm", whole=False)), "<i2") / 32767
    assert len(samples_N) == round(NUM_SAMPLES * 1.5)
    assert media_type("pcm", 24_000) == "audio/pcm;rate=24000;channels=1"
    times_s = np.arange(len(samples_N)) / 24_000
    assert np.corrcoef(samples_N, np.sin(2 * np.pi * 220 * times_s))[0, 1] > 0.99


def test_only_flac_is_sent_whole_unless_the_client_says_otherwise():
    unasked = {name: is_sent_whole(name, None) for name in get_args(AudioFormat)}
    assert [name for name, whole in unasked.items() if whole] == ["flac"]
    assert is_sent_whole("mp3", stream=False)
    assert not is_sent_whole("flac", stream=True)


def test_every_format_of_openai_has_a_container_but_raw_pcm():
    assert {*CONTAINERS, "pcm"} == set(get_args(AudioFormat))


@pytest.mark.parametrize("speed", [0.25, 0.7, 1.0, 2.0, 4.0])
def test_speed_changes_the_length_and_not_the_pitch(speed: float):
    tempo = Tempo(speed, RATE_HZ)
    parts = [tempo.change(WAVE_N[at : at + 5000]) for at in range(0, NUM_SAMPLES, 5000)]
    changed_N = np.concatenate([*parts, tempo.change(WAVE_N[:0], is_last=True)])
    assert len(changed_N) == pytest.approx(NUM_SAMPLES / speed, abs=0.09 * RATE_HZ)
    spectrum = np.abs(np.fft.rfft(changed_N))
    assert np.argmax(spectrum) * RATE_HZ / len(changed_N) == pytest.approx(220, abs=2)
