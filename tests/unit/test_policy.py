from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from speechalign.config.policy import ArConfig, NarConfig
from speechalign.errors import ConfigError, DataError, MalformedCodes, UnspeakableText
from speechalign.policy.ar import build_ar, load_ar, save_ar
from speechalign.policy.nar import Nar, NarModel, load_nar, save_nar
from speechalign.policy.prompt_format import (
    answer_codes,
    answer_token_ids,
    prompt_token_ids,
    with_feedback,
)
from speechalign.policy.text import check_text
from speechalign.policy.vocabulary import Vocabulary

VOCABULARY = Vocabulary(symbols=" ab", num_codebooks=2, codebook_size=16)


def test_a_prompt_by_hand():
    codes_KT = np.array([[0, 1, 2], [3, 4, 5], [9, 9, 9]])
    ids = prompt_token_ids(VOCABULARY, "ba", codes_KT, prefix_frames=2)
    # codes from 8, the second level 16 further; text after both levels, from 40
    assert ids == (2, 8 + 0, 24 + 3, 8 + 1, 24 + 4, 3, 42, 41, 4)


def test_an_answer_by_hand():
    assert answer_token_ids(VOCABULARY, np.array([[7], [2], [5]])) == (15, 26, 1)


def test_feedback_goes_in_front_and_replaces_earlier_feedback():
    assert with_feedback((2, 8, 3, 42, 4), is_good=True) == (5, 2, 8, 3, 42, 4)
    assert with_feedback((5, 2, 8, 3, 42, 4), is_good=False) == (6, 2, 8, 3, 42, 4)


@given(hnp.arrays(np.int64, st.tuples(st.just(2), st.integers(0, 30)), elements=st.integers(0, 15)))
def test_an_answer_reads_back_as_its_codes(codes_KT: np.ndarray):
    ids = answer_token_ids(VOCABULARY, codes_KT)
    np.testing.assert_array_equal(answer_codes(VOCABULARY, ids), codes_KT)
    np.testing.assert_array_equal(answer_codes(VOCABULARY, ids[:-1]), codes_KT)


@pytest.mark.parametrize("ids", [(8, 1), (24, 8), (2, 24), (8, 1, 24, 8)])
def test_ids_that_are_no_frames_are_refused(ids: tuple[int, ...]):
    with pytest.raises(MalformedCodes):
        answer_codes(VOCABULARY, ids)


def test_half_a_frame_that_the_length_cap_left_is_dropped():
    assert answer_codes(VOCABULARY, (8, 24, 9, 25, 10)).tolist() == [[0, 1], [0, 1]]
    assert answer_codes(VOCABULARY, (8,)).shape == (2, 0)


def test_a_short_speaker_prompt_is_refused():
    with pytest.raises(DataError, match="1 frames, the policy wants 2"):
        prompt_token_ids(VOCABULARY, "a", np.zeros((2, 1), np.int64), prefix_frames=2)


def test_an_unknown_symbol_is_named():
    with pytest.raises(UnspeakableText, match=r"'\?' \(U\+003F\)"):
        VOCABULARY.encode_text("ab?")


def test_the_vocabulary_survives_its_file(tmp_path: Path):
    VOCABULARY.save(tmp_path / "vocabulary.json")
    assert Vocabulary.load(tmp_path / "vocabulary.json") == VOCABULARY
    assert VOCABULARY.size == 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no word"),
        ("  ...", "no word"),
        ("a" * 401, "401 characters"),
        ("hello \U0001f600", "U\\+1F600"),
        ("привет a", "U\\+0438"),
        ("a\x07b", "U\\+0007"),
    ],
)
def test_a_text_that_cannot_be_spoken_is_refused_with_the_reason(text: str, message: str):
    with pytest.raises(UnspeakableText, match=message):
        check_text(text)


def test_a_policy_survives_its_folder(tmp_path: Path):
    config = ArConfig(num_layers=1, hidden_size=32, num_heads=2)
    model = build_ar(config, VOCABULARY).eval()
    facts = {"codec_fingerprint": "f", "policy_version": 3, "prefix_frames": 2}
    save_ar(tmp_path / "ar", model, VOCABULARY, facts)
    loaded = load_ar(tmp_path / "ar")
    ids = torch.tensor([[2, 8, 24, 3, 41, 4]])
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, model(ids).logits)
    assert loaded.facts["policy_version"] == 3
    assert loaded.vocabulary == VOCABULARY


def test_a_policy_without_its_facts_is_not_saved(tmp_path: Path):
    model = build_ar(ArConfig(num_layers=1, hidden_size=32, num_heads=2), VOCABULARY)
    with pytest.raises(DataError, match="prefix_frames"):
        save_ar(tmp_path / "ar", model, VOCABULARY, {"codec_fingerprint": "f"})


def a_nar() -> Nar:
    torch.manual_seed(0)
    config = NarConfig(hidden_size=16, dilations=(1, 2), num_levels=3, speaker_frames=4)
    model = NarModel(config, num_codebooks=3, codebook_size=16).eval()
    return Nar(model=model, facts={"codec_fingerprint": "f"})


def test_levels_are_filled_behind_level_1_and_padding_changes_nothing():
    nar = a_nar()
    rng = np.random.default_rng(0)
    level1s = [rng.integers(0, 16, length) for length in (5, 9)]
    speakers = [rng.integers(0, 16, (3, 4)) for _ in level1s]
    together = nar.fill(level1s, speakers, 3)
    alone = [
        nar.fill([codes], [voice], 3)[0] for codes, voice in zip(level1s, speakers, strict=True)
    ]
    for batched, single, level1 in zip(together, alone, level1s, strict=True):
        np.testing.assert_array_equal(batched, single)
        np.testing.assert_array_equal(batched[0], level1)
        assert batched.shape == (3, len(level1))


def test_more_levels_than_the_model_knows_are_refused():
    with pytest.raises(ConfigError, match="knows 3 levels"):
        a_nar().fill([np.zeros(2, np.int64)], [np.zeros((3, 4), np.int64)], 4)


def test_a_nar_survives_its_folder_up_to_half_precision(tmp_path: Path):
    nar = a_nar()
    save_nar(tmp_path / "nar", nar.model, {"codec_fingerprint": "f"})
    loaded = load_nar(tmp_path / "nar")
    assert loaded.facts["codec_fingerprint"] == "f"
    for name, tensor in loaded.model.state_dict().items():
        torch.testing.assert_close(tensor, nar.model.state_dict()[name], atol=1e-3, rtol=1e-3)
