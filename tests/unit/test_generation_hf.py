from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from speechalign.config.policy import ArConfig
from speechalign.config.sampling import TransformersConfig
from speechalign.errors import ConfigError
from speechalign.generation.base import GenerationRequest, SamplingParams
from speechalign.generation.hf import TransformersEngine, processed_logprobs
from speechalign.policy.ar import build_ar, load_ar, save_ar
from speechalign.policy.logprobs import answer_logprobs
from speechalign.policy.vocabulary import EOS_ID, Vocabulary

PARAMS = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=12, eos_id=EOS_ID)
SHORT, LONG = (2, 9, 3, 20, 4), (2, 9, 10, 11, 12, 3, 20, 21, 22, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("policy") / "ar"
    vocabulary = Vocabulary(symbols="abc", num_codebooks=1, codebook_size=8)
    model = build_ar(ArConfig(hidden_size=64, num_layers=2, num_heads=2), vocabulary)
    facts = {"codec_fingerprint": "f", "policy_version": 3, "prefix_frames": 1}
    save_ar(folder, model, vocabulary, facts)
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> TransformersEngine:
    return TransformersEngine(folder, TransformersConfig(max_model_len=64, max_num_seqs=3))


def test_an_answer_does_not_depend_on_the_requests_beside_it(engine: TransformersEngine) -> None:
    together = engine.generate(
        [
            GenerationRequest(prompt_token_ids=SHORT, seeds=(1, 2)),
            GenerationRequest(prompt_token_ids=LONG, seeds=(3, 4)),
        ],
        PARAMS,
    )
    alone = engine.generate([GenerationRequest(prompt_token_ids=SHORT, seeds=(2,))], PARAMS)
    assert together[0][1].token_ids == alone[0][0].token_ids
    assert together[0][0].token_ids != together[0][1].token_ids


def test_logprobs_are_the_trainers(engine: TransformersEngine, folder: Path) -> None:
    requests = [
        GenerationRequest(prompt_token_ids=SHORT, seeds=(1, 2)),
        GenerationRequest(prompt_token_ids=LONG, seeds=(3,)),
    ]
    model = load_ar(folder).model
    for request, group in zip(requests, engine.generate(requests, PARAMS), strict=True):
        for generation in group:
            ids_BS = torch.tensor([request.prompt_token_ids + generation.token_ids])
            mask_BS = torch.arange(ids_BS.shape[1])[None] >= len(request.prompt_token_ids)
            with torch.inference_mode():
                logprobs_BS = answer_logprobs(model(input_ids=ids_BS).logits, ids_BS, mask_BS)
            trainer_S = logprobs_BS[0, len(request.prompt_token_ids) :]
            np.testing.assert_allclose(generation.logprobs, trainer_S, atol=1e-5)


def test_an_answer_ends_with_its_stop_token_or_is_truncated(engine: TransformersEngine) -> None:
    request = GenerationRequest(prompt_token_ids=SHORT, seeds=tuple(range(40)))
    group = engine.generate([request], replace(PARAMS, max_new_tokens=30))[0]
    assert {generation.is_truncated for generation in group} == {True, False}
    for generation in group:
        assert EOS_ID not in generation.token_ids[:-1]
        assert generation.is_truncated == (generation.token_ids[-1] != EOS_ID)
        assert len(generation.token_ids) == 30 or not generation.is_truncated


def test_a_temperature_of_zero_takes_the_likeliest_token_for_every_seed(
    engine: TransformersEngine,
) -> None:
    request = GenerationRequest(prompt_token_ids=SHORT, seeds=(1, 2))
    one, other = engine.generate([request], replace(PARAMS, temperature=0.0))[0]
    assert one.token_ids == other.token_ids


def test_a_prompt_that_leaves_no_room_for_the_answer_is_a_config_error(
    engine: TransformersEngine,
) -> None:
    request = GenerationRequest(prompt_token_ids=SHORT, seeds=(1,))
    with pytest.raises(ConfigError, match="5 tokens and 60 new ones exceed max_model_len 64"):
        engine.generate([request], replace(PARAMS, max_new_tokens=60))


def test_the_version_is_that_of_the_policy(engine: TransformersEngine) -> None:
    assert engine.policy_version == 3


def probabilities(**changes: float) -> list[float]:
    logits_BV = torch.tensor([[0.5, 0.1, 0.3, 0.1]]).log()
    params = replace(PARAMS, **changes)  # pyright: ignore[reportArgumentType]
    return processed_logprobs(logits_BV, params).exp()[0].tolist()


def test_a_temperature_below_one_sharpens() -> None:
    assert probabilities(temperature=0.5) == pytest.approx(
        [0.25 / 0.36, 0.01 / 0.36, 0.09 / 0.36, 0.01 / 0.36]
    )


def test_top_k_keeps_the_likeliest_and_renormalises() -> None:
    assert probabilities(top_k=2) == pytest.approx([0.625, 0.0, 0.375, 0.0])


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    assert probabilities(top_p=0.6) == pytest.approx([0.625, 0.0, 0.375, 0.0])


def test_tokens_that_are_not_allowed_are_never_drawn() -> None:
    logits_BV = torch.tensor([[0.0, 5.0, 1.0, 1.0]])
    logprobs_BV = processed_logprobs(logits_BV, replace(PARAMS, allowed_ids=(2, 3)))
    assert logprobs_BV.exp().tolist() == [[0.0, 0.0, 0.5, 0.5]]
