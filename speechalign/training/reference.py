"""Log-probabilities of the frozen reference, computed once and kept.

The key is what they depend on: the reference's files and the pairs. DPO then needs one model in
memory instead of two.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from speechalign.artifacts import (
    MANIFEST,
    committed_folder,
    is_committed,
    sha256_of,
    verify_folder,
)
from speechalign.errors import ConfigError, LogprobMismatch
from speechalign.policy.answer_batch import AnswerBatch, collate_answers
from speechalign.policy.ar import load_ar
from speechalign.policy.logprobs import answer_logprobs, token_entropies
from speechalign.policy.prompt_format import with_feedback
from speechalign.training.losses import PairLogprobs
from speechalign.types import PreferencePair, Sample

Precision: TypeAlias = Literal["fp32", "bf16"]
Answered: TypeAlias = tuple[Sequence[int], Sequence[int]]
"""The token ids of a prompt and of an answer."""

logger = logging.getLogger(__name__)

TABLE = "reference.parquet"
PAIRS_PER_BATCH = 8


def cached_reference_logprobs(
    policy_folder: Path, pairs: Sequence[PreferencePair], folder: Path, precision: Precision
) -> dict[str, tuple[float, float]]:
    """Return {pair_id: (chosen, rejected)} summed log-probabilities under a frozen policy.

    Args:
        policy_folder: the reference.
        pairs: what to score.
        folder: where the answer is kept.
        precision: of the training; bf16 moves a sum over a hundred tokens by half a nat, which
            would look like a policy that moved before its first update.
    """
    key = _key(policy_folder, pairs, precision)
    if not (is_committed(folder) and verify_folder(folder).get("key") == key):
        with committed_folder(folder, {"key": key}) as partial:
            pq.write_table(_compute(policy_folder, pairs, precision), partial / TABLE)
    else:
        logger.info("reference log-probs: cached")
    rows = pq.read_table(folder / TABLE).to_pylist()
    return {row["pair_id"]: (row["chosen"], row["rejected"]) for row in rows}


def sampler_difference(policy_folder: Path, samples: Sequence[Sample], tolerance: float) -> float:
    """Return the largest difference between the sampler's log-probs and the trainer's.

    Only samples drawn at temperature 1 with the whole vocabulary can agree.

    Raises:
        LogprobMismatch: it is above the tolerance, or not a number.
    """
    model = load_ar(policy_folder).model
    worst = 0.0
    for sample in samples:
        batch = collate_answers([(sample.prompt_token_ids, sample.token_ids)])
        logprobs_S = token_logprobs(model, batch)[0, len(sample.prompt_token_ids) :]
        difference = float(np.abs(logprobs_S.numpy() - np.array(sample.logprobs)).max())
        if not difference <= tolerance:  # NaN is above no limit, and below none
            raise LogprobMismatch(
                f"sampler and trainer give different log-probs: {difference:.2e} nats on a token "
                f"of sample {sample.sample_id} (limit {tolerance:g}, "
                "training.max_logprob_difference); check that engine.dtype and "
                "training.engine.precision match"
            )
        worst = max(worst, difference)
    return worst


def pair_logprobs(
    model: nn.Module,
    pairs: Sequence[PreferencePair],
    *,
    tells_feedback: bool = False,
    with_entropy: bool = False,
) -> PairLogprobs:
    """Return summed log-probabilities of both sides, from one forward pass over all answers.

    Args:
        model: the policy or its reference.
        pairs: one prompt each.
        tells_feedback: the prompts say which side it is, as chain of hindsight wants.
        with_entropy: from the same logits.
    """
    good = [_prompt(pair, is_good=True if tells_feedback else None) for pair in pairs]
    bad = [_prompt(pair, is_good=False if tells_feedback else None) for pair in pairs]
    rows = [(prompt, p.chosen_token_ids) for prompt, p in zip(good, pairs, strict=True)]
    rows += [(prompt, p.rejected_token_ids) for prompt, p in zip(bad, pairs, strict=True)]
    device = next(model.parameters()).device
    batch = collate_answers(rows).to(device)
    logits_BSV = _logits(model, batch)
    summed_B = answer_logprobs(logits_BSV, batch.input_ids_BS, batch.answer_mask_BS).sum(1)
    tokens_B = batch.answer_mask_BS.sum(1)
    count = len(pairs)
    entropy_B = None
    if with_entropy:
        entropy_BS = token_entropies(logits_BSV.detach(), batch.answer_mask_BS)
        entropy_B = (entropy_BS[:count] + entropy_BS[count:]).sum(1)
        entropy_B = entropy_B / (tokens_B[:count] + tokens_B[count:])
    return PairLogprobs(
        chosen_B=summed_B[:count],
        rejected_B=summed_B[count:],
        chosen_tokens_B=tokens_B[:count],
        rejected_tokens_B=tokens_B[count:],
        entropy_B=entropy_B,
    )


def mismatched(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """Return each pair with the chosen answer of the next one that has another prompt.

    What KTO estimates its KL from (Ethayarajh et al. 2024, section 4.1). It depends on the table
    alone: not on batches, not on ranks.

    Raises:
        ConfigError: all pairs have one prompt.
    """
    found: list[PreferencePair] = []
    for index, pair in enumerate(pairs):
        later = (pairs[(index + step) % len(pairs)] for step in range(1, len(pairs)))
        answer = next((p.chosen_token_ids for p in later if _fits(p, pair)), None)
        if answer is None:
            raise ConfigError("kto needs pairs of at least two prompts to estimate its KL")
        found.append(replace(pair, chosen_token_ids=answer))
    return found


def _fits(other: PreferencePair, pair: PreferencePair) -> bool:
    is_elsewhere = other.prompt_id != pair.prompt_id
    return is_elsewhere and other.chosen_token_ids != pair.rejected_token_ids


def answer_sums(model: nn.Module, rows: Sequence[Answered]) -> torch.Tensor:
    """Return the summed log-prob of each answer."""
    batch = collate_answers(rows).to(next(model.parameters()).device)
    return _forward(model, batch).sum(1)


def _prompt(pair: PreferencePair, *, is_good: bool | None) -> tuple[int, ...]:
    ids = pair.prompt_token_ids
    return ids if is_good is None else with_feedback(ids, is_good=is_good)


@torch.no_grad()
def token_logprobs(model: nn.Module, batch: AnswerBatch) -> torch.Tensor:
    """Return logprobs_BS of the answers, without gradients."""
    return _forward(model, batch)


def _logits(model: nn.Module, batch: AnswerBatch) -> torch.Tensor:
    return model(
        input_ids=batch.input_ids_BS, attention_mask=batch.attention_mask_BS, use_cache=False
    ).logits


def _forward(model: nn.Module, batch: AnswerBatch) -> torch.Tensor:
    logits_BSV = _logits(model, batch)
    return answer_logprobs(logits_BSV, batch.input_ids_BS, batch.answer_mask_BS)


@torch.no_grad()
def _compute(
    policy_folder: Path, pairs: Sequence[PreferencePair], precision: Precision
) -> pa.Table:
    model = load_ar(policy_folder).model
    ordered = sorted(pairs, key=lambda p: len(p.chosen_token_ids) + len(p.rejected_token_ids))
    rows: list[dict[str, str | float]] = []
    for first in range(0, len(ordered), PAIRS_PER_BATCH):
        batch = ordered[first : first + PAIRS_PER_BATCH]
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logprobs = pair_logprobs(model, batch)
        chosen, rejected = logprobs.chosen_B.tolist(), logprobs.rejected_B.tolist()
        for pair, high, low in zip(batch, chosen, rejected, strict=True):
            rows.append({"pair_id": pair.pair_id, "chosen": high, "rejected": low})
    return pa.Table.from_pylist(rows)


def _key(policy_folder: Path, pairs: Sequence[PreferencePair], precision: Precision) -> str:
    digest = hashlib.sha256(f"{precision} {sha256_of(policy_folder / MANIFEST)}".encode())
    for pair in pairs:
        sides = (pair.prompt_token_ids, pair.chosen_token_ids, pair.rejected_token_ids)
        digest.update(json.dumps([pair.pair_id, *sides]).encode())
    return digest.hexdigest()
