import numpy as np
import pytest

from speechalign.errors import DataError
from speechalign.rows import (
    clip_from_row,
    codes_from_flat,
    pairs_from_table,
    pairs_to_table,
    pcm_from_waveform,
    prompts_from_table,
    prompts_to_table,
    sample_from_row,
    samples_to_table,
    scored_from_row,
    waveform_from_pcm,
)
from speechalign.types import Measured, PairKind, PreferencePair, Sample, Unmeasured
from tests.builders import a_prompt, a_sample


def a_pair(chosen: tuple[int, ...] = (8, 1), rejected: tuple[int, ...] = (9, 1)) -> PreferencePair:
    return PreferencePair(
        pair_id="p0/ranked",
        kind=PairKind.RANKED,
        prompt_id="p0",
        policy_version=3,
        codec_fingerprint="f",
        prompt_token_ids=(2, 3),
        chosen_token_ids=chosen,
        rejected_token_ids=rejected,
        margin=0.5,
    )


def test_a_prompt_survives_the_table_with_its_codes_level_by_level():
    prompt = a_prompt()
    (again,) = prompts_from_table(prompts_to_table([prompt]))
    np.testing.assert_array_equal(again.speaker_codes_KT, [[0, 1, 2, 3], [4, 5, 6, 7]])
    np.testing.assert_array_equal(again.golden_codes_KT, prompt.golden_codes_KT)
    assert (again.prompt_id, again.phonemes) == ("p0", a_prompt().phonemes)


def test_a_sample_survives_the_table():
    sample = a_sample(index=3)
    (row,) = samples_to_table([sample], {"p0": a_prompt()}).to_pylist()
    assert sample_from_row(row) == sample


def test_a_pair_survives_the_table():
    assert pairs_from_table(pairs_to_table([a_pair()])) == [a_pair()]


def test_pcm_keeps_a_waveform_to_half_a_step_and_clips_beyond_full_scale():
    waveform_N = np.array([0.0, 0.25, -1.0, 1.0, 7.0], dtype=np.float32)
    again_N = waveform_from_pcm(pcm_from_waveform(waveform_N))
    np.testing.assert_allclose(again_N, [0.0, 0.25, -1.0, 1.0, 1.0], atol=1.0 / 32767)


def test_flat_codes_are_stored_level_after_level():
    assert codes_from_flat([1, 2, 3, 4, 5, 6], 2).tolist() == [[1, 2, 3], [4, 5, 6]]


def test_a_clip_carries_what_a_judge_needs():
    (row,) = samples_to_table([a_sample()], {"p0": a_prompt()}).to_pylist()
    sound = pcm_from_waveform(np.array([0.5], dtype=np.float32))
    row |= {"sample_rate_hz": 16000, "golden_duration_s": 1.5}
    clip = clip_from_row(row | {"waveform_pcm": sound, "reference_pcm": sound})
    assert (clip.sample_id, clip.golden_duration_s, clip.waveform_N.size) == ("p0/0", 1.5, 1)


def test_a_failed_judgement_is_a_null_with_its_reason_and_never_a_number():
    (row,) = samples_to_table([a_sample()], {"p0": a_prompt()}).to_pylist()
    row |= {"wer": 0.25, "mos": None, "judge_errors": "mos: too short"}
    scored = scored_from_row(row, ("wer", "mos"), Measured(0.75))
    assert scored.measures == {"wer": Measured(0.25), "mos": Unmeasured("mos: too short")}


@pytest.mark.parametrize("sides", [((), (9,)), ((9,), ()), ((9, 1), (9, 1))])
def test_a_pair_without_two_different_sides_is_no_pair(sides: tuple[tuple[int, ...], ...]):
    with pytest.raises(DataError):
        a_pair(*sides)


def test_a_sample_needs_one_logprob_a_token():
    with pytest.raises(DataError, match="2 token ids but 1 logprobs"):
        Sample(
            prompt_id="p0",
            sample_index=0,
            policy_version=0,
            codec_fingerprint="f",
            prompt_token_ids=(2,),
            token_ids=(8, 1),
            logprobs=(-1.0,),
            temperature=1.0,
            is_truncated=False,
        )
