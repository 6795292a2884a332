"""One policy, two engines: the same log-probabilities, and the same answers for the same seeds."""

import asyncio
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from speechalign.config.policy import ArConfig
from speechalign.config.sampling import TransformersConfig, VllmConfig
from speechalign.errors import ConfigError
from speechalign.generation.base import Engine, GenerationRequest, SamplingParams
from speechalign.generation.build import build_generation_engine
from speechalign.generation.hf import TransformersEngine
from speechalign.generation.streams import AnswerStreams
from speechalign.generation.vllm import VllmEngine
from speechalign.policy.ar import build_ar, load_ar, save_ar
from speechalign.policy.logprobs import answer_logprobs
from speechalign.policy.vocabulary import EOS_ID, Vocabulary

pytest.importorskip("vllm")
pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.filterwarnings("ignore")]

PARAMS = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=40, eos_id=EOS_ID)


def a_policy(folder: Path, *, seed: int, version: int) -> Path:
    torch.manual_seed(seed)
    vocabulary = Vocabulary(symbols="abc", num_codebooks=1, codebook_size=53)
    model = build_ar(ArConfig(hidden_size=64, num_layers=2, num_heads=2), vocabulary)
    for parameter in model.parameters():  # a random Llama is nearly uniform; this one is not
        parameter.data *= 4 if parameter.ndim == 2 else 1
    facts = {"codec_fingerprint": "f", "policy_version": version, "prefix_frames": 2}
    save_ar(folder, model, vocabulary, facts)
    return folder


def some_requests() -> list[GenerationRequest]:
    rng = np.random.default_rng(0)
    return [
        GenerationRequest(
            prompt_token_ids=tuple(rng.integers(8, 60, size).tolist()),
            seeds=(1000 + 2 * index, 1001 + 2 * index),
        )
        for index, size in enumerate((5, 17, 9, 30))
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("policies")
    return a_policy(root / "v0", seed=0, version=0), a_policy(root / "v1", seed=1, version=1)


@pytest.fixture(scope="module")
def vllm_engine(folders: tuple[Path, Path]) -> Iterator[Engine]:
    environment, set_num_threads = dict(os.environ), torch.set_num_threads
    yield build_generation_engine(
        folders[0], VllmConfig(max_model_len=128, max_num_seqs=8, kv_cache_mib=64)
    )
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads = set_num_threads


def test_an_engine_that_cannot_start_is_a_config_error(
    vllm_engine: Engine, folders: tuple[Path, Path]
):
    with pytest.raises(ConfigError, match=r"vLLM cannot serve .*'max_model_len': 4096"):
        VllmEngine(folders[0], VllmConfig(max_model_len=4096, max_num_seqs=8, kv_cache_mib=64))


def trainer_logprobs(
    folder: Path, prompt: tuple[int, ...], answer: tuple[int, ...]
) -> NDArray[np.float32]:
    ids_BS = torch.tensor([prompt + answer])
    mask_BS = torch.arange(ids_BS.shape[1])[None] >= len(prompt)
    with torch.inference_mode():
        logits_BSV = load_ar(folder).model(input_ids=ids_BS).logits
    return answer_logprobs(logits_BSV, ids_BS, mask_BS)[0, len(prompt) :].numpy()


def largest_difference(engine: Engine, folder: Path) -> float:
    requests = some_requests()
    return max(
        float(np.abs(trainer_logprobs(folder, r.prompt_token_ids, g.token_ids) - g.logprobs).max())
        for r, group in zip(requests, engine.generate(requests, PARAMS), strict=True)
        for g in group
    )


def test_vllm_logprobs_are_the_trainers(vllm_engine: Engine, folders: tuple[Path, Path]) -> None:
    assert largest_difference(vllm_engine, folders[0]) <= 1e-4


def test_vllm_scores_a_given_answer_as_the_trainer_does(
    vllm_engine: Engine, folders: tuple[Path, Path]
) -> None:
    answers = [((9, 10, 11), (12, 13, 1)), ((8, 9), (20,)), ((30,) * 17, (14,) * 9)]
    reference = build_generation_engine(folders[0], TransformersConfig(max_model_len=128))
    scored = zip(answers, vllm_engine.score(answers), reference.score(answers), strict=True)
    for (prompt, answer), ours, theirs in scored:
        expected = trainer_logprobs(folders[0], prompt, answer)
        np.testing.assert_allclose(ours, expected, atol=1e-4)
        np.testing.assert_allclose(theirs, expected, atol=1e-5)


@pytest.mark.parametrize(
    "changes", [{}, {"temperature": 0.7, "top_p": 0.8}, {"top_k": 5}, {"temperature": 0.0}]
)
def test_the_same_seed_gives_the_same_answer_in_both_engines(
    vllm_engine: Engine, folders: tuple[Path, Path], changes: dict[str, float]
) -> None:
    params = replace(PARAMS, **changes)  # pyright: ignore[reportArgumentType]
    reference = build_generation_engine(folders[0], TransformersConfig(max_model_len=128))
    ours = reference.generate(some_requests(), params)
    theirs = vllm_engine.generate(some_requests(), params)
    for group, other_group in zip(ours, theirs, strict=True):
        for one, other in zip(group, other_group, strict=True):
            assert one.token_ids == other.token_ids
            assert one.is_truncated == other.is_truncated
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_new_weights_in_place_answer_as_their_own_trainer_would(
    vllm_engine: Engine, folders: tuple[Path, Path]
) -> None:
    vllm_engine.load_policy(folders[1])
    try:
        assert vllm_engine.policy_version == 1
        assert largest_difference(vllm_engine, folders[1]) <= 1e-4
    finally:
        vllm_engine.load_policy(folders[0])


def test_answers_made_step_by_step_are_those_of_a_whole_batch(
    vllm_engine: VllmEngine | TransformersEngine, folders: tuple[Path, Path]
) -> None:
    params = replace(PARAMS, allowed_ids=(EOS_ID, *range(8, 40)))
    requests = [replace(request, seeds=request.seeds[:1]) for request in some_requests()]
    reference = build_generation_engine(folders[0], TransformersConfig(max_model_len=128))
    expected = [list(group[0].token_ids) for group in reference.generate(requests, params)]
    assert {token for answer in expected for token in answer} <= set(params.allowed_ids or ())
    streams = AnswerStreams(vllm_engine)

    async def answers() -> list[list[int]]:
        async def one(request: GenerationRequest) -> list[int]:
            pieces = streams.answer(request.prompt_token_ids, request.seeds[0], params)
            return [token async for piece in pieces for token in piece.token_ids]

        left = streams.answer(requests[0].prompt_token_ids, 0, params)
        await anext(left)
        await left.aclose()  # its slot is free again, and nobody else's answer changes
        return await asyncio.gather(*map(one, requests))

    assert asyncio.run(answers()) == expected
    streams.close()
