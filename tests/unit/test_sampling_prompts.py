from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from speechalign.config.sampling import PromptsConfig
from speechalign.errors import DataError
from speechalign.policy.vocabulary import EOS_ID, Vocabulary
from speechalign.rows import GOLDEN, SAMPLE, prompts_from_table, prompts_to_table, sample_from_row
from speechalign.sampling.prompts import admit_prompts, build_prompts, golden_samples
from tests.builders import a_prompt

FACTS = {"codec_fingerprint": "f", "prefix_frames": 2}


def a_clip(clip_id: str, *, speaker: str = "s0", num_frames: int = 20, **changes: Any) -> Any:
    codes_KT = int(clip_id[1:]) * 100 + np.arange(2 * num_frames).reshape(2, num_frames)
    return {
        "clip_id": clip_id,
        "text": f"text of {clip_id}",
        "phonemes": "ab",
        "speaker_id": speaker,
        "source": "flite",
        "kind": "synthetic",
        "split": "train",
        "num_frames": num_frames,
        "codes": codes_KT.reshape(-1),
        "codec_fingerprint": "f",
    } | changes


def a_table(*clips: Any) -> pa.Table:
    return pa.Table.from_pylist(list(clips), schema=GOLDEN)


def a_config(**changes: Any) -> PromptsConfig:
    return PromptsConfig.model_validate({"num_prompts": 2, "speaker_frames": 5} | changes)


def a_vocabulary(symbols: str = "abdɔ\u0261") -> Vocabulary:
    return Vocabulary(symbols=symbols, num_codebooks=1, codebook_size=64)


def test_the_voice_is_a_crop_of_another_recording_of_the_speaker() -> None:
    table = a_table(a_clip("c1"), a_clip("c2"), a_clip("c3", speaker="s1"))
    prompts = build_prompts(table, a_config(), seed=0)
    assert {prompt.prompt_id for prompt in prompts} == {"c1", "c2"}
    for prompt in prompts:
        other = 200 if prompt.prompt_id == "c1" else 100
        start = int(prompt.speaker_codes_KT[0, 0]) - other
        expected_KT = other + start + np.array([np.arange(5), 20 + np.arange(5)])
        assert 0 <= start <= 15
        np.testing.assert_array_equal(prompt.speaker_codes_KT, expected_KT)


def test_the_recording_of_the_text_is_kept_whole() -> None:
    prompt = build_prompts(a_table(a_clip("c1"), a_clip("c2")), a_config(), seed=0)[0]
    first = int(prompt.prompt_id[1:]) * 100
    np.testing.assert_array_equal(prompt.golden_codes_KT, first + np.arange(40).reshape(2, 20))


def test_the_choice_depends_on_the_seed_and_not_on_the_order_of_rows() -> None:
    clips = [a_clip(f"c{index}") for index in range(1, 30)]
    config = a_config(num_prompts=5)
    ids = [p.prompt_id for p in build_prompts(a_table(*clips), config, seed=0)]
    assert ids == [p.prompt_id for p in build_prompts(a_table(*clips[::-1]), config, seed=0)]
    assert ids != [p.prompt_id for p in build_prompts(a_table(*clips), config, seed=1)]


@pytest.mark.parametrize(
    "other",
    [
        {"text": "text of c1"},
        {"num_frames": 4, "codes": [0] * 8},
        {"split": "test"},
        {"speaker": "s1"},
    ],
)
def test_a_recording_that_cannot_be_the_voice_leaves_no_prompt(other: dict[str, Any]) -> None:
    table = a_table(a_clip("c1"), a_clip("c2", **other))
    with pytest.raises(DataError, match=r"only [01] of .* lower num_prompts"):
        build_prompts(table, a_config(), seed=0)


def test_too_long_recordings_are_voices_but_no_prompts() -> None:
    table = a_table(a_clip("c1"), a_clip("c2", num_frames=30))
    config = a_config(num_prompts=1, max_golden_frames=20)
    assert [prompt.prompt_id for prompt in build_prompts(table, config, seed=0)] == ["c1"]


@pytest.mark.parametrize("name", ["kinds", "sources", "speakers"])
def test_only_what_the_config_allows_is_chosen(name: str) -> None:
    clips = [a_clip("c1"), a_clip("c2")]
    clips += [a_clip("c3", speaker="s1", source="vits", kind="human")]
    clips += [a_clip("c4", speaker="s1", source="vits", kind="human")]
    wanted = {"kinds": "human", "sources": "vits", "speakers": "s1"}[name]
    prompts = build_prompts(a_table(*clips), a_config(**{name: (wanted,)}), seed=0)
    assert {prompt.prompt_id for prompt in prompts} == {"c3", "c4"}


def test_a_text_that_the_policy_cannot_read_goes_to_quarantine() -> None:
    prompts = [a_prompt(prompt_id="p0"), a_prompt(prompt_id="p1")]
    vocabulary = a_vocabulary("d")
    with pytest.raises(DataError, match="none of 2 prompts"):
        admit_prompts(prompts, vocabulary, FACTS, max_prompt_tokens=20)
    admitted = admit_prompts(prompts, a_vocabulary(), FACTS, max_prompt_tokens=20)
    assert admitted.prompts.num_rows == 2
    assert admitted.quarantine.num_rows == 0


def test_the_reason_of_a_quarantined_prompt_is_kept() -> None:
    prompts = [a_prompt(prompt_id="p0"), a_prompt(prompt_id="p1", num_frames=1)]
    admitted = admit_prompts(prompts, a_vocabulary(), FACTS, max_prompt_tokens=20)
    assert [prompt.prompt_id for prompt in prompts_from_table(admitted.prompts)] == ["p0"]
    row = admitted.quarantine.to_pylist()[0]
    assert (row["stage"], row["row_id"]) == ("prompts", "p1")
    assert "1 frames, the policy wants 2" in row["reason"]


def test_a_prompt_that_leaves_no_room_for_an_answer_is_not_admitted() -> None:
    with pytest.raises(DataError, match="8 tokens, more than the 7"):
        admit_prompts([a_prompt()], a_vocabulary(), FACTS, max_prompt_tokens=7)


def test_prompts_and_policy_of_different_codecs_refuse_to_meet() -> None:
    facts = FACTS | {"codec_fingerprint": "g"}
    with pytest.raises(DataError, match="fingerprint f, the AR policy g"):
        admit_prompts([a_prompt()], a_vocabulary(), facts, max_prompt_tokens=20)


def test_the_golden_sample_of_a_prompt_is_its_recording() -> None:
    prompt = a_prompt()
    table = golden_samples(prompts_to_table([prompt]), a_vocabulary())
    assert table.schema == SAMPLE
    sample = sample_from_row(table.to_pylist()[0])
    assert sample.token_ids == (*(8 + prompt.golden_codes_KT[0]).tolist(), EOS_ID)
    assert sample.policy_version == -1
