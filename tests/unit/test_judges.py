from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from speechalign.config.judges import (
    DistillMosConfig,
    DnsMosConfig,
    RecogniserConfig,
    SignalConfig,
    judge_measures,
    judge_name,
)
from speechalign.judges.build import build_judge
from speechalign.judges.signal import silence_ratio
from speechalign.judges.words import normalise, word_errors
from speechalign.types import Clip, Unmeasured


def a_clip(waveform_N: np.ndarray, golden_duration_s: float = 1.0) -> Clip:
    return Clip(
        sample_id="p0/0",
        text="the dog slept",
        waveform_N=waveform_N.astype(np.float32),
        reference_waveform_N=waveform_N.astype(np.float32),
        sample_rate_hz=16000,
        golden_duration_s=golden_duration_s,
    )


def test_texts_are_compared_as_words():
    assert (
        normalise("The TWENTY-one  dogs, didn\u2019t sleep!") == "the twenty one dogs didn't sleep"
    )
    assert normalise("'Mr. Fox' had one of the dogs\u2019") == "mister fox had one of the dogs"


@pytest.mark.parametrize(
    ("digits", "words"),
    [
        ("7 apples and 42 pears", "seven apples and forty two pears"),
        ("365 days", "three hundred sixty five days"),
        ("1,000,001 dogs", "one million one dogs"),
        ("in 1848, 1905 or 1900", "in eighteen forty eight nineteen oh five or nineteen hundred"),
        ("1,848 and 2024", "one thousand eight hundred forty eight and two thousand twenty four"),
        ("the 1st, 22nd and 20th", "the first twenty second and twentieth"),
        ("the 12th of 100,000", "the twelfth of one hundred thousand"),
        ("0012345678901", "zero zero one two three four five six seven eight nine zero one"),
        ("a4 or 4x4", "a four or four x four"),
    ],
)
def test_numbers_are_compared_as_words(digits: str, words: str):
    assert normalise(digits) == words


@pytest.mark.parametrize(
    ("heard", "wer", "errors"),
    [
        ("The dog slept.", 0.0, 0),
        ("the cat slept", 1 / 3, 1),
        ("the dog", 1 / 3, 1),
        ("", 1.0, 3),
        ("the dog slept and slept and slept", 4 / 3, 4),
    ],
)
def test_word_errors_by_hand(heard: str, wer: float, errors: int):
    found = word_errors("The dog slept", heard)
    assert found.wer == pytest.approx(wer)
    assert (found.word_errors, found.words) == (errors, 3)


def test_half_of_a_clip_can_be_silent():
    loud = np.sin(np.arange(8000))
    assert silence_ratio(a_clip(np.concatenate([loud, np.zeros(8000)]))) == pytest.approx(0.5)
    assert silence_ratio(a_clip(np.zeros(16000))) == 1.0


def test_durations_are_compared_with_the_recording():
    judge = build_judge(SignalConfig())
    (measured, unknown) = judge.judge(
        [a_clip(np.ones(8000)), a_clip(np.ones(8000), golden_duration_s=0.0)]
    )
    assert not isinstance(measured, Unmeasured)
    assert measured["duration_ratio"] == pytest.approx(0.5)
    assert isinstance(unknown, Unmeasured)


def test_the_names_of_a_judge_are_known_without_its_model():
    config = RecogniserConfig(model="base", role="eval")
    assert judge_name(config) == "eval_recogniser"
    assert judge_measures(config)[:2] == ("eval_text_logprob", "eval_wer")
    listens_only = config.model_copy(update={"transcribe": False})
    assert judge_measures(listens_only) == ("eval_text_logprob",)
    assert judge_measures(SignalConfig()) == build_judge(SignalConfig()).measures


@pytest.mark.parametrize("is_supported", [True, False])
def test_distillmos_computes_in_bf16_only_where_the_cpu_does(
    is_supported: bool, monkeypatch: pytest.MonkeyPatch
):
    import torch

    from speechalign.judges.naturalness import DistillMos

    mkldnn = SimpleNamespace(_is_mkldnn_bf16_supported=lambda: is_supported)
    monkeypatch.setattr(torch.ops, "mkldnn", mkldnn)
    judge = build_judge(DistillMosConfig(dtype="bf16"))
    assert isinstance(judge, DistillMos)
    seen: list[object] = []

    def hear(wave_1N: torch.Tensor) -> float:
        seen.append(torch.is_autocast_enabled("cpu"))
        return float(wave_1N.mean())

    monkeypatch.setattr(judge, "_model", hear)
    judge.judge([a_clip(np.ones(16000))])
    assert seen == [is_supported]


def test_dnsmos_hears_a_short_clip_in_one_window(monkeypatch: pytest.MonkeyPatch):
    from speechmos import dnsmos

    judge = build_judge(DnsMosConfig())
    noise = np.random.default_rng(0).standard_normal(16000 * 3).astype(np.float32) / 20
    # 2.3 s doubled twice are 9.2 s: there the package itself hears one window.
    clip = a_clip(noise[:36_800])
    (judgement,) = judge.judge([clip])
    assert not isinstance(judgement, Unmeasured)
    own: Any = dnsmos.run(clip.waveform_N, 16000)
    assert judgement["dnsmos"] == pytest.approx(own["ovrl_mos"], abs=1e-6)

    heard: list[int] = []

    def count(wave_N: np.ndarray, *_: object, **__: object) -> dict[str, float]:
        heard.append(len(wave_N))
        return {"ovrl_mos": 3.0}

    monkeypatch.setattr(judge, "_model", count)
    judge.judge([a_clip(noise[:32_000])])  # the package would hear eight
    assert heard == [144_160]


def test_the_networks_of_dnsmos_keep_to_their_threads(monkeypatch: pytest.MonkeyPatch):
    import onnxruntime

    opened: list[tuple[str, int]] = []

    class Session:
        def __init__(self, path: Path, options: Any, **_: object) -> None:
            opened.append((path.name, options.intra_op_num_threads))

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    build_judge(DnsMosConfig(num_threads=3))
    assert opened == [("sig_bak_ovr.onnx", 3), ("model_v8.onnx", 3)]
