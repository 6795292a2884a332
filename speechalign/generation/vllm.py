"""Answers from a vLLM engine inside this process: the only import of vllm.

Measured here, and the reason for the settings below:
    - A prompt that vLLM prefills in chunks loses its seed (on a CPU it crashes: "CPU Generator
      does not use offset"), so chunked prefill is off and a step holds the longest prompt.
    - Idle OpenMP threads spin: 2 threads on 2 busy cores were 5 times slower than 1.
    - `torch.compile` of vLLM's sampler: without it the first batch took 7.4 s instead of 9.3 s.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from speechalign.config.sampling import VllmConfig
from speechalign.errors import ConfigError, EngineDead
from speechalign.generation.base import (
    Generation,
    GenerationRequest,
    SamplingParams,
    check_lengths,
)
from speechalign.generation.streams import Piece
from speechalign.policy.ar import check_ar

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}
CPU_ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCH_COMPILE_DISABLE": "1"}
LEAST_FREE_SHARE = 0.05
MIN_BATCHED_TOKENS = 4096
"""The least number of tokens in one step of the engine."""


class VllmEngine:
    """An `Engine` with continuous batching; it lives as long as its actor."""

    def __init__(self, folder: Path, config: VllmConfig) -> None:
        self._config = config
        self._policy_version = int(check_ar(folder)["policy_version"])
        self._vllm = _import_vllm(config)
        try:
            self._llm = self._vllm.LLM(model=str(folder), **_settings_of(config))
        except (ValueError, RuntimeError) as error:
            raise ConfigError(
                f"vLLM cannot serve {folder} with engine {config.model_dump(mode='json')}: {error}"
            ) from error

    @property
    def policy_version(self) -> int:
        """Of the weights that answer now."""
        return self._policy_version

    def load_policy(self, folder: Path) -> None:
        """Replace the weights in place by those of another policy of the same shape."""
        version = int(check_ar(folder)["policy_version"])
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        self._llm.apply_model(_tie_head)
        self._llm.reset_prefix_cache()
        self._policy_version = version

    def generate(
        self, requests: Sequence[GenerationRequest], params: SamplingParams
    ) -> list[list[Generation]]:
        """Return one list per request, with one answer per seed, in order."""
        check_lengths(requests, params, self._config.max_model_len)
        prompts = [
            {"prompt_token_ids": list(request.prompt_token_ids)}
            for request in requests
            for _ in request.seeds
        ]
        settings = [self._settings(params, seed) for r in requests for seed in r.seeds]
        outputs = self._generate(prompts, settings)
        flat = iter([_generation(output.outputs[0], params) for output in outputs])
        return [[next(flat) for _ in request.seeds] for request in requests]

    def score(
        self, answers: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[tuple[float, ...]]:
        """Return the log-probs at temperature 1 of given (prompt, answer) token ids."""
        prompts = [{"prompt_token_ids": [*prompt, *answer]} for prompt, answer in answers]
        settings = self._vllm.SamplingParams(
            temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False
        )
        outputs = self._generate(prompts, settings)
        return [
            _prompt_logprobs(output, len(prompt))
            for output, (prompt, _) in zip(outputs, answers, strict=True)
        ]

    def add(
        self, answer_id: str, prompt_token_ids: Sequence[int], seed: int, params: SamplingParams
    ) -> None:
        """Begin an answer that `step` goes on with."""
        request = GenerationRequest(prompt_token_ids=tuple(prompt_token_ids), seeds=(seed,))
        check_lengths([request], params, self._config.max_model_len)
        settings = self._settings(params, seed)
        settings.output_kind = self._vllm.sampling_params.RequestOutputKind.DELTA
        settings.logprobs = None  # nobody reads them
        prompt = {"prompt_token_ids": list(prompt_token_ids)}
        self._llm.llm_engine.add_request(answer_id, prompt, settings)

    def step(self) -> list[Piece]:
        """Give every answer in the making its next tokens."""
        try:
            outputs = self._llm.llm_engine.step()
        except (RuntimeError, AssertionError) as error:
            raise EngineDead(f"vLLM failed and must be started again: {error}") from error
        return [
            Piece(
                answer_id=output.request_id,
                token_ids=tuple(output.outputs[0].token_ids),
                is_last=output.finished,
                is_truncated=output.outputs[0].finish_reason == "length",
            )
            for output in outputs
        ]

    def abort(self, answer_ids: Sequence[str]) -> None:
        """Forget answers."""
        self._llm.llm_engine.abort_request(list(answer_ids))

    def _generate(self, prompts: Any, settings: Any) -> Any:
        try:
            return self._llm.generate(prompts, settings, use_tqdm=False)
        except (RuntimeError, AssertionError) as error:
            # vLLM's loop has state that an exception leaves half updated: nothing after this
            # can be trusted, whatever the cause was.
            raise EngineDead(f"vLLM failed and must be started again: {error}") from error

    def _settings(self, params: SamplingParams, seed: int) -> Any:
        return self._vllm.SamplingParams(
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            max_tokens=params.max_new_tokens,
            stop_token_ids=[params.eos_id],
            seed=seed if params.temperature else None,
            detokenize=False,
            logprobs=0,
            allowed_token_ids=None if params.allowed_ids is None else list(params.allowed_ids),
        )


def _settings_of(config: VllmConfig) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "dtype": DTYPES[config.dtype],
        "enforce_eager": config.enforce_eager,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": max(MIN_BATCHED_TOKENS, config.max_model_len),
        "enable_chunked_prefill": False,
        "enable_prefix_caching": True,
        "kv_cache_memory_bytes": config.kv_cache_mib * 2**20,
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
    }
    if config.device == "cuda":
        # The cache's size is said above, but vLLM still refuses a GPU of which less than this
        # share is free: 92 % by default, which no trainer or second engine would leave.
        settings["gpu_memory_utilization"] = LEAST_FREE_SHARE
    return settings


def _import_vllm(config: VllmConfig) -> Any:
    os.environ.update(ENVIRONMENT)
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override kv_cache_mib
    if config.device == "cpu":
        os.environ.update(CPU_ENVIRONMENT)
        torch.set_num_threads(config.num_threads)  # vLLM forbids it later
    try:
        import vllm
    except ImportError as error:
        raise ConfigError(
            f"vLLM cannot be imported ({error}); install the extra `cpu` or `gpu`, or use "
            "the engine kind `transformers`"
        ) from error
    return vllm


def _tie_head(model: Any) -> None:
    """Give an output head that shares the embedding's weights the reloaded ones.

    `reload_weights` skips it (vLLM 0.29: "ParallelLMHead: Failed to load weights"), and a CPU
    computes with a packed copy of the old ones.
    """
    if model.config.tie_word_embeddings:
        model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data)
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


def _generation(output: Any, params: SamplingParams) -> Generation:
    token_ids = tuple(output.token_ids)
    logprobs = tuple(
        step[token].logprob for step, token in zip(output.logprobs, token_ids, strict=True)
    )
    return Generation(
        token_ids=token_ids,
        logprobs=logprobs,
        is_truncated=not token_ids or token_ids[-1] != params.eos_id,
    )


def _prompt_logprobs(output: Any, start: int) -> tuple[float, ...]:
    ids = output.prompt_token_ids
    return tuple(
        output.prompt_logprobs[place][ids[place]].logprob for place in range(start, len(ids))
    )
