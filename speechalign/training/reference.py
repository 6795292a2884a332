"""Log-probabilities of the frozen reference, computed once and kept.

The key is what they depend on: the reference's files and the pairs. DPO then needs one model in
memory instead of two.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from speechalign.training.losses import Drift, PairLogprobs
from speechalign.training.policy_losses import kl_k1, kl_k3
from speechalign.training.rollouts import gathered, spread
from speechalign.types import PairKind, PreferencePair, Sample

Precision: TypeAlias = Literal["fp32", "bf16"]
Answered: TypeAlias = tuple[Sequence[int], Sequence[int]]
"""The token ids of a prompt and of an answer."""
AnswerLogprobs: TypeAlias = tuple[Sequence[float], Sequence[float]]
"""Log-probabilities of the tokens of a pair's chosen and rejected answer; none of an empty one."""

logger = logging.getLogger(__name__)

TABLE = "reference.parquet"
LOGPROBS = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("chosen", pa.list_(pa.float32()), nullable=False),
        pa.field("rejected", pa.list_(pa.float32()), nullable=False),
    ]
)
PAIRS_PER_BATCH = 8


def cached_reference_logprobs(
    policy_folder: Path, pairs: Sequence[PreferencePair], folder: Path, precision: Precision
) -> dict[str, AnswerLogprobs]:
    """Return what a frozen policy gives the tokens of each pair, by pair_id.

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
    reference: Sequence[AnswerLogprobs] | None = None,
) -> PairLogprobs:
    """Return summed log-probabilities of both sides, from one forward pass over all answers.

    Args:
        model: the policy or its reference.
        pairs: one prompt each.
        tells_feedback: the prompts say which side it is, as chain of hindsight wants.
        reference: what another model gives the tokens of each pair; the drift is from it.
    """
    read = _read(model, pairs, tells_feedback=tells_feedback)
    summed_B = read.placed(read.logprobs_AS.sum(1))
    tokens_B = read.placed(read.batch.answer_mask_BS.sum(1))
    count = len(pairs)
    return PairLogprobs(
        chosen_B=summed_B[:count],
        rejected_B=summed_B[count:],
        chosen_tokens_B=tokens_B[:count],
        rejected_tokens_B=tokens_B[count:],
        drift=None if reference is None else _drift(read, pairs, reference),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """What a model says of A answers: the chosen ones of all pairs, then the rejected ones.

    Of a labelled answer one side is empty, and no forward pass is spent on it.
    """

    batch: AnswerBatch
    logits_ASV: torch.Tensor
    logprobs_AS: torch.Tensor
    row_A: torch.Tensor
    """Of each answer, were none empty."""
    num_rows: int

    def placed(self, of_answers_A: torch.Tensor) -> torch.Tensor:
        """Return the values with 0 where there is no answer."""
        return of_answers_A.new_zeros(self.num_rows).index_copy(0, self.row_A, of_answers_A)

    def a_token(self, of_tokens_AS: torch.Tensor, counts_A: torch.Tensor) -> torch.Tensor:
        """Return means over the tokens of both answers of a pair, as far as an answer counts."""
        tokens_A = self.batch.answer_mask_BS.sum(1) * counts_A
        half = self.num_rows // 2
        sums, tokens = self.placed(of_tokens_AS.sum(1) * counts_A), self.placed(tokens_A)
        return (sums[:half] + sums[half:]) / (tokens[:half] + tokens[half:])


def _read(
    model: nn.Module, pairs: Sequence[PreferencePair], *, tells_feedback: bool = False
) -> _Read:
    good = [_prompt(pair, is_good=True if tells_feedback else None) for pair in pairs]
    bad = [_prompt(pair, is_good=False if tells_feedback else None) for pair in pairs]
    rows = [(prompt, p.chosen_token_ids) for prompt, p in zip(good, pairs, strict=True)]
    rows += [(prompt, p.rejected_token_ids) for prompt, p in zip(bad, pairs, strict=True)]
    device = next(model.parameters()).device
    batch = collate_answers([row for row in rows if row[1]]).to(device)
    logits_ASV = _logits(model, batch)
    return _Read(
        batch=batch,
        logits_ASV=logits_ASV,
        logprobs_AS=answer_logprobs(logits_ASV, batch.input_ids_BS, batch.answer_mask_BS),
        row_A=torch.tensor([number for number, row in enumerate(rows) if row[1]], device=device),
        num_rows=len(rows),
    )


@torch.no_grad()
def _drift(
    read: _Read, pairs: Sequence[PreferencePair], reference: Sequence[AnswerLogprobs]
) -> Drift:
    known = [chosen for chosen, _ in reference] + [rejected for _, rejected in reference]
    mask_AS = read.batch.answer_mask_BS
    reference_AS = spread([torch.tensor(values) for values in known if values], mask_AS)
    own_AS = read.logprobs_AS.detach()
    # KL(reference || policy), token by token, of what a policy drew: nobody drew a recording.
    # Pairs of earlier iterations were drawn by an older policy than the reference may be.
    is_drawn = [pair.kind is not PairKind.GOLDEN for pair in pairs] + [True] * len(pairs)
    is_drawn_A = torch.tensor(is_drawn, device=own_AS.device)[read.row_A]
    return Drift(
        entropy_B=read.a_token(
            token_entropies(read.logits_ASV.detach(), mask_AS), torch.ones_like(is_drawn_A)
        ),
        kl_k1_B=read.a_token(kl_k1(reference_AS, own_AS), is_drawn_A),
        kl_k3_B=read.a_token(kl_k3(reference_AS, own_AS), is_drawn_A),
    )


def mismatched(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """Return each pair with the answer of the next one that has another prompt as its chosen.

    Of a pair the answer is the chosen one, of a labelled answer the only one.

    What KTO estimates its KL from (Ethayarajh et al. 2024, section 4.1). It depends on the table
    alone: not on batches, not on ranks.

    Raises:
        ConfigError: all pairs have one prompt.
    """
    found: list[PreferencePair] = []
    for index, pair in enumerate(pairs):
        later = (pairs[(index + step) % len(pairs)] for step in range(1, len(pairs)))
        answer = next((_an_answer(p) for p in later if _fits(p, pair)), None)
        if answer is None:
            raise ConfigError("kto needs answers to at least two prompts to estimate its KL")
        is_alone = pair.kind is PairKind.LABELLED
        other_side = () if is_alone else pair.rejected_token_ids
        found.append(replace(pair, chosen_token_ids=answer, rejected_token_ids=other_side))
    return found


def _an_answer(pair: PreferencePair) -> tuple[int, ...]:
    return pair.chosen_token_ids or pair.rejected_token_ids


def _fits(other: PreferencePair, pair: PreferencePair) -> bool:
    is_elsewhere = other.prompt_id != pair.prompt_id
    is_alone = pair.kind is PairKind.LABELLED
    return is_elsewhere and (is_alone or _an_answer(other) != pair.rejected_token_ids)


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
    rows: list[dict[str, str | list[float]]] = []
    for first in range(0, len(ordered), PAIRS_PER_BATCH):
        batch = ordered[first : first + PAIRS_PER_BATCH]
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            read = _read(model, batch)
        said = gathered(read.logprobs_AS, read.batch.answer_mask_BS)
        values = {int(row): own.tolist() for row, own in zip(read.row_A, said, strict=True)}
        for number, pair in enumerate(batch):
            chosen, rejected = values.get(number, []), values.get(len(batch) + number, [])
            rows.append({"pair_id": pair.pair_id, "chosen": chosen, "rejected": rejected})
    return pa.Table.from_pylist(rows, schema=LOGPROBS)


def _key(policy_folder: Path, pairs: Sequence[PreferencePair], precision: Precision) -> str:
    digest = hashlib.sha256(f"tokens {precision} {sha256_of(policy_folder / MANIFEST)}".encode())
    for pair in pairs:
        sides = (pair.prompt_token_ids, pair.chosen_token_ids, pair.rejected_token_ids)
        digest.update(json.dumps([pair.pair_id, *sides]).encode())
    return digest.hexdigest()
