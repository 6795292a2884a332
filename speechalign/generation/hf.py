"""Answers from a transformers model in a plain loop, with a generator of its own per answer.

Shapes: B answers in flight, S positions so far, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache

from speechalign.config.sampling import TransformersConfig
from speechalign.generation.base import (
    Generation,
    GenerationRequest,
    SamplingParams,
    check_lengths,
)
from speechalign.generation.streams import Piece
from speechalign.policy.answer_batch import collate_answers
from speechalign.policy.ar import load_ar
from speechalign.policy.logprobs import answer_logprobs
from speechalign.policy.vocabulary import PAD_ID

COMPACT_BELOW = 0.75
"""Finished answers leave the batch when fewer than this share of its rows still speak."""


@dataclass(slots=True)
class _Answer:
    prompt_token_ids: tuple[int, ...]
    generator: torch.Generator
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    cache: DynamicCache | None = None
    """Of an answer that is made step by step; a batch of answers shares one elsewhere."""

    def is_done(self, params: SamplingParams) -> bool:
        return len(self.token_ids) >= params.max_new_tokens or self.has_stopped(params)

    def has_stopped(self, params: SamplingParams) -> bool:
        return bool(self.token_ids) and self.token_ids[-1] == params.eos_id


class TransformersEngine:
    """An `Engine` for machines without vLLM, and the reference that vLLM is compared with."""

    def __init__(self, folder: Path, config: TransformersConfig) -> None:
        torch.set_num_threads(config.num_threads)
        self._config = config
        self._stepped: dict[str, tuple[_Answer, SamplingParams]] = {}
        self.load_policy(folder)

    @property
    def policy_version(self) -> int:
        """Of the loaded weights."""
        return self._policy_version

    def load_policy(self, folder: Path) -> None:
        """Replace the policy."""
        policy = load_ar(folder, device=self._config.device, dtype=self._config.dtype)
        self._model = policy.model
        self._policy_version = int(policy.facts["policy_version"])

    def generate(
        self, requests: Sequence[GenerationRequest], params: SamplingParams
    ) -> list[list[Generation]]:
        """Return one list per request, with one answer per seed, in order."""
        check_lengths(requests, params, self._config.max_model_len)
        answers = [
            [_Answer(request.prompt_token_ids, self._generator(seed)) for seed in request.seeds]
            for request in requests
        ]
        flat = [answer for group in answers for answer in group]
        size = self._config.max_num_seqs
        for start in range(0, len(flat), size):
            self._answer(flat[start : start + size], params)
        return [[_finished(answer, params) for answer in group] for group in answers]

    @torch.inference_mode()
    def score(
        self, answers: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[tuple[float, ...]]:
        """Return the log-probs at temperature 1 of given (prompt, answer) token ids."""
        batch = collate_answers(answers).to(torch.device(self._config.device))
        logits_BSV = self._model(
            input_ids=batch.input_ids_BS, attention_mask=batch.attention_mask_BS, use_cache=False
        ).logits
        logprobs_BS = answer_logprobs(logits_BSV, batch.input_ids_BS, batch.answer_mask_BS)
        pairs = zip(logprobs_BS, batch.answer_mask_BS, strict=True)
        return [tuple(logprobs_S[mask_S].tolist()) for logprobs_S, mask_S in pairs]

    def add(
        self, answer_id: str, prompt_token_ids: Sequence[int], seed: int, params: SamplingParams
    ) -> None:
        """Begin an answer that `step` goes on with."""
        request = GenerationRequest(prompt_token_ids=tuple(prompt_token_ids), seeds=(seed,))
        check_lengths([request], params, self._config.max_model_len)
        answer = _Answer(request.prompt_token_ids, self._generator(seed))
        answer.cache = DynamicCache(config=self._model.config)
        self._stepped[answer_id] = (answer, params)

    @torch.inference_mode()
    def step(self) -> list[Piece]:
        """Give every answer in the making its next token, one after another."""
        pieces: list[Piece] = []
        for answer_id, (answer, params) in list(self._stepped.items()):
            is_new = not answer.token_ids
            ids = list(answer.prompt_token_ids) if is_new else answer.token_ids[-1:]
            logits_BV = self._model(
                input_ids=torch.tensor([ids], device=self._config.device),
                past_key_values=answer.cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            _draw(logits_BV, [answer], params)
            is_last = answer.is_done(params)
            piece = Piece(
                answer_id=answer_id,
                token_ids=(answer.token_ids[-1],),
                is_last=is_last,
                is_truncated=is_last and not answer.has_stopped(params),
            )
            pieces.append(piece)
            if is_last:
                del self._stepped[answer_id]
        return pieces

    def abort(self, answer_ids: Sequence[str]) -> None:
        """Forget answers."""
        for answer_id in answer_ids:
            self._stepped.pop(answer_id, None)

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator(device=self._config.device).manual_seed(seed)

    @torch.inference_mode()
    def _answer(self, answers: list[_Answer], params: SamplingParams) -> None:
        ids_BS, mask_BS = self._left_padded([answer.prompt_token_ids for answer in answers])
        position_ids_BS = (mask_BS.cumsum(dim=1) - 1).clamp(min=0)
        cache = DynamicCache(config=self._model.config)
        while True:
            logits_BV = self._model(
                input_ids=ids_BS,
                attention_mask=mask_BS,
                position_ids=position_ids_BS,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            tokens_B = _draw(logits_BV, answers, params)
            kept = _still_speaking(answers, params)
            if not kept:
                return
            if len(kept) < COMPACT_BELOW * len(answers):
                kept_B = torch.tensor(kept, device=tokens_B.device)
                cache.batch_select_indices(kept_B)
                answers = [answers[index] for index in kept]
                tokens_B, mask_BS = tokens_B[kept_B], mask_BS[kept_B]
                position_ids_BS = position_ids_BS[kept_B]
            ids_BS = tokens_B[:, None]
            mask_BS = torch.nn.functional.pad(mask_BS, (0, 1), value=1)
            position_ids_BS = position_ids_BS[:, -1:] + 1

    def _left_padded(self, prompts: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        pairs = list(zip(padding, prompts, strict=True))
        ids = [[PAD_ID] * pad + list(prompt) for pad, prompt in pairs]
        mask = [[0] * pad + [1] * len(prompt) for pad, prompt in pairs]
        device = self._config.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def processed_logprobs(logits_BV: Tensor, params: SamplingParams) -> Tensor:
    """Return logprobs_BV of the distribution that is drawn from, in float32.

    Temperature first, then the `top_k` likeliest tokens, then the smallest set of tokens whose
    probability reaches `top_p`: the order of vLLM. Tokens that cannot be drawn have -inf.
    """
    logits_BV = logits_BV.float() / (params.temperature or 1.0)
    if params.allowed_ids is not None:
        allowed_V = torch.zeros(logits_BV.shape[-1], dtype=torch.bool, device=logits_BV.device)
        allowed_V[list(params.allowed_ids)] = True
        logits_BV = logits_BV.masked_fill(~allowed_V, -torch.inf)
    if params.top_k:
        kept_BK = logits_BV.topk(min(params.top_k, logits_BV.shape[-1]), dim=-1).values
        logits_BV = logits_BV.masked_fill(logits_BV < kept_BK[:, -1:], -torch.inf)
    if params.top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
        probs_BV = sorted_BV.softmax(dim=-1)
        is_cut_BV = probs_BV.cumsum(dim=-1) - probs_BV >= params.top_p
        logits_BV = logits_BV.scatter(-1, order_BV, sorted_BV.masked_fill(is_cut_BV, -torch.inf))
    return logits_BV.log_softmax(dim=-1)


def _draw(logits_BV: Tensor, answers: list[_Answer], params: SamplingParams) -> Tensor:
    """Give every unfinished answer its next token; the race of exponentials is vLLM's.

    The token is argmax(p / q) with q exponential, one draw of V numbers per answer and step, so
    that the same seed gives the same answer in both engines, up to rounding.
    """
    logprobs_BV = processed_logprobs(logits_BV, params)
    race_BV = logprobs_BV.exp()
    if params.temperature:
        q_BV = torch.empty_like(race_BV)
        for q_V, answer in zip(q_BV, answers, strict=True):
            q_V.exponential_(generator=answer.generator)
        race_BV = race_BV / q_BV
    tokens_B = race_BV.argmax(dim=-1)
    picked_B = logprobs_BV.gather(-1, tokens_B[:, None])[:, 0]
    for answer, token, logprob in zip(answers, tokens_B.tolist(), picked_B.tolist(), strict=True):
        if not answer.is_done(params):
            answer.token_ids.append(token)
            answer.logprobs.append(logprob)
    return tokens_B


def _still_speaking(answers: list[_Answer], params: SamplingParams) -> list[int]:
    return [index for index, answer in enumerate(answers) if not answer.is_done(params)]


def _finished(answer: _Answer, params: SamplingParams) -> Generation:
    return Generation(
        token_ids=tuple(answer.token_ids),
        logprobs=tuple(answer.logprobs),
        is_truncated=not answer.has_stopped(params),
    )
