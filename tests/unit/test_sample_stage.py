"""Whose luck a sample has: its policy version's, or one that all policies share."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from speechalign.config.policy import ArConfig
from speechalign.config.sampling import SamplingConfig, TransformersConfig
from speechalign.errors import BudgetExceeded, DataError
from speechalign.pipeline.sample import training_prompts, write_prompts
from speechalign.policy.ar import build_ar, save_ar
from speechalign.policy.vocabulary import GOOD_ID, Vocabulary
from speechalign.rows import prompts_to_table
from speechalign.sampling.pipeline import check_rendered
from speechalign.sampling.stages import SampleStage
from speechalign.types import Prompt
from tests.tiny_stack import build_tiny_stack, tiny_recipe

CODEC = "0" * 16


def one_prompt() -> pa.Table:
    rng = np.random.default_rng(0)
    prompt = Prompt(
        prompt_id="p0",
        text="ab",
        phonemes="ab",
        speaker_id="s",
        speaker_codes_KT=rng.integers(0, 48, (8, 10)).astype(np.int16),
        golden_codes_KT=rng.integers(0, 48, (8, 25)).astype(np.int16),
        codec_fingerprint=CODEC,
    )
    return prompts_to_table([prompt])


def answers(folder: Path, version: int, *, common_seeds: bool) -> list[list[int]]:
    sampling = SamplingConfig(samples_per_prompt=2, max_new_tokens=8, common_seeds=common_seeds)
    return token_ids(sampled(folder, version, sampling))


def token_ids(table: pa.Table, column: str = "token_ids") -> list[list[int]]:
    return [list(row[column]) for row in table.to_pylist()]


def test_a_policy_that_knows_feedback_is_asked_for_good_speech(tmp_path: Path):
    sampling = SamplingConfig(max_new_tokens=1)
    bare = token_ids(sampled(tmp_path, 0, sampling), "prompt_token_ids")
    knows = sampled(tmp_path / "coh", 0, sampling, knows_feedback=True)
    asked = token_ids(knows, "prompt_token_ids")
    assert asked == [[GOOD_ID, *prompt] for prompt in bare]


def sampled(folder: Path, version: int, sampling: SamplingConfig, **facts: object) -> pa.Table:
    torch.manual_seed(0)
    vocabulary = Vocabulary(symbols="ab", num_codebooks=1, codebook_size=48)
    facts = {"codec_fingerprint": CODEC, "policy_version": version, "prefix_frames": 3} | facts
    path = folder / f"{version}-{sampling.common_seeds}"
    model = build_ar(ArConfig(hidden_size=64, num_layers=1, num_heads=2), vocabulary)
    save_ar(path, model, vocabulary, facts)
    engine = TransformersConfig(max_model_len=64)
    stage = SampleStage(path, engine, sampling, run_seed=0)
    return stage(one_prompt())


def test_versions_of_a_policy_have_luck_of_their_own_unless_they_are_to_share_it(tmp_path: Path):
    own = [answers(tmp_path, version, common_seeds=False) for version in (0, 1)]
    assert own[0] != own[1]
    common = [answers(tmp_path, version, common_seeds=True) for version in (0, 1)]
    assert common[0] == common[1]
    first, second = common[0]
    assert first != second


def test_temperatures_are_dealt_out_in_turn_and_kept_with_the_sample(tmp_path: Path):
    mixed = SamplingConfig(samples_per_prompt=5, temperatures=(1.0, 0.0), max_new_tokens=8)
    table = sampled(tmp_path, 0, mixed)
    assert table["temperature"].to_pylist() == [1.0, 0.0, 1.0, 0.0, 1.0]
    ids = token_ids(table)
    assert ids[1] == ids[3]  # the likeliest, twice
    assert len({tuple(answer) for answer in ids[::2]}) == 3
    warm = SamplingConfig(samples_per_prompt=5, max_new_tokens=8)
    alone = token_ids(sampled(tmp_path / "warm", 0, warm))
    assert alone[::2] == ids[::2]  # the seeds are those of the index


def test_fresh_prompts_are_others_in_every_iteration_and_the_same_ones_stay(tmp_path: Path):
    stack = build_tiny_stack(tmp_path / "stack", num_clips=72)
    asked: dict[str, list[set[str]]] = {}
    for prompts in ("fresh", "same"):
        pipeline = {"iterations": 3, "prompts": prompts}
        config = tiny_recipe(stack, tmp_path / prompts, pipeline=pipeline)
        write_prompts(config, config.run_dir / "prompts")
        tables = [training_prompts(config, number) for number in (1, 2, 3)]
        asked[prompts] = [set(map(str, table["prompt_id"].to_pylist())) for table in tables]
    fresh, same = asked["fresh"], asked["same"]
    assert [len(ids) for ids in fresh] == [12, 12, 12]
    assert len(fresh[0] | fresh[1] | fresh[2]) == 36
    assert same[0] == same[1] == same[2] == fresh[0]


def test_too_few_recordings_for_fresh_prompts_say_how_to_do_with_fewer(tmp_path: Path):
    stack = build_tiny_stack(tmp_path / "stack")
    config = tiny_recipe(stack, tmp_path / "run", pipeline={"iterations": 3})
    with pytest.raises(DataError, match="3 iterations want 12 other prompts each"):
        write_prompts(config, config.run_dir / "prompts")


def test_answers_that_cannot_be_rendered_have_a_budget():
    lost = {"stage": "render", "row_id": "p/0", "reason": "rendering: out of memory"}
    prompt = {"stage": "prompts", "row_id": "q", "reason": "too long"}
    check_rendered([lost, prompt, prompt], 19)
    check_rendered([lost], 0)  # nothing is left, which another error says
    with pytest.raises(BudgetExceeded, match=r"2 of 21 answers .* out of memory"):
        check_rendered([lost, lost], 19)
