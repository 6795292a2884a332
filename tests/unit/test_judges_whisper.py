"""What the recogniser's judgement is made of; the models themselves are heard in the demo."""

import math

import numpy as np
import pytest

from speechalign.config.judges import RecogniserConfig
from speechalign.judges import whisper
from speechalign.judges.whisper import FLOOR_LOGPROB, Whisper, mean_logprob, sentence_case
from speechalign.types import Clip, Unmeasured


def test_the_log_prob_of_a_text_is_the_mean_over_its_tokens_above_a_floor():
    assert mean_logprob([0.5, 0.25]) == pytest.approx((math.log(0.5) + math.log(0.25)) / 2)
    assert mean_logprob([1.0, 0.0]) == pytest.approx(FLOOR_LOGPROB / 2)


def test_a_text_in_capitals_is_put_to_whisper_as_it_would_write_it():
    assert sentence_case("THE DOG SLEPT") == "The dog slept"
    assert sentence_case("The NASA dog") == "The NASA dog"


def speech(text: str) -> Clip:
    import hibari
    import soxr

    wave_N = soxr.resample(
        np.asarray(hibari.Hibari()("The dog slept in the garden.")), 24000, 16000
    )
    return Clip(
        sample_id="p/0",
        text=text,
        waveform_N=wave_N.astype(np.float32),
        reference_waveform_N=wave_N.astype(np.float32),
        sample_rate_hz=16000,
        golden_duration_s=1.0,
    )


def test_the_text_that_was_said_is_likelier_than_another_and_silence_is_the_floor():
    judge = Whisper(RecogniserConfig(model="tiny.en", role="reward"))
    said = speech("The dog slept in the garden.")
    other = speech("My king bought her a new ship.")
    silent = Clip(
        sample_id="p/1",
        text=said.text,
        waveform_N=np.zeros(16000, np.float32),
        reference_waveform_N=said.waveform_N,
        sample_rate_hz=16000,
        golden_duration_s=1.0,
    )
    first, second, third = judge.judge([said, other, silent])
    assert not isinstance(first, Unmeasured)
    assert not isinstance(second, Unmeasured)
    assert not isinstance(third, Unmeasured)
    assert (first["reward_wer"], second["reward_wer"], third["reward_wer"]) == (0.0, 1.0, 1.0)
    assert first["reward_transcript"] == "The dog slept in the garden."
    assert float(first["reward_text_logprob"]) > -0.5
    assert float(second["reward_text_logprob"]) < -3
    assert third["reward_text_logprob"] == FLOOR_LOGPROB


def test_a_transcript_that_loops_is_heard_again_and_then_counts_as_nothing(
    monkeypatch: pytest.MonkeyPatch,
):
    judge = Whisper(RecogniserConfig(model="tiny.en", role="eval"))
    said = speech("The dog slept in the garden.")
    monkeypatch.setattr(whisper, "TOKENS_PER_S", 0)
    monkeypatch.setattr(whisper, "SPARE_TOKENS", 3)
    (heard,) = judge.listen([said])
    assert (heard.loops, heard.transcript) == (True, "")


def test_without_a_transcript_the_log_prob_is_nearly_the_same_in_a_shorter_window():
    said = speech("The dog slept in the garden.")
    config = RecogniserConfig(model="tiny.en", role="reward")
    (whole,) = Whisper(config).judge([said])
    short = Whisper(config.model_copy(update={"transcribe": False}))
    (only,) = short.judge([said])
    assert not isinstance(whole, Unmeasured)
    assert not isinstance(only, Unmeasured)
    assert set(only) == {"reward_text_logprob"} == set(short.measures)
    assert float(only["reward_text_logprob"]) == pytest.approx(
        float(whole["reward_text_logprob"]), abs=0.1
    )
    assert only != {"reward_text_logprob": whole["reward_text_logprob"]}  # another window
