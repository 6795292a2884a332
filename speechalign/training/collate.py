"""Rows of token ids to padded tensors, and the order in which rows are trained on.

Shapes: B rows, S token positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from speechalign.policy.vocabulary import PAD_ID
from speechalign.seeds import derive_seed

RowT = TypeVar("RowT")
BUCKET_BATCHES = 32
"""Batches are cut from windows of this many, sorted by length: little padding, much chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerBatch:
    """Prompts with their answers, padded on the right."""

    input_ids_BS: Tensor
    attention_mask_BS: Tensor
    answer_mask_BS: Tensor
    """True on the answer, its stop token included; never on the prompt or on padding."""

    def to(self, device: torch.device) -> "AnswerBatch":
        """Return the batch on a device."""
        return AnswerBatch(
            input_ids_BS=self.input_ids_BS.to(device),
            attention_mask_BS=self.attention_mask_BS.to(device),
            answer_mask_BS=self.answer_mask_BS.to(device),
        )


def collate_answers(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> AnswerBatch:
    """Return one batch of (prompt, answer) rows."""
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    input_ids_BS = torch.full((len(rows), longest), PAD_ID)
    attention_mask_BS = torch.zeros(len(rows), longest, dtype=torch.bool)
    answer_mask_BS = torch.zeros(len(rows), longest, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(rows):
        stop = len(prompt) + len(answer)
        input_ids_BS[row, :stop] = torch.tensor([*prompt, *answer])
        attention_mask_BS[row, :stop] = True
        answer_mask_BS[row, len(prompt) : stop] = True
    return AnswerBatch(
        input_ids_BS=input_ids_BS,
        attention_mask_BS=attention_mask_BS,
        answer_mask_BS=answer_mask_BS,
    )


class BatchPlan:
    """Which rows make up the batch of a step: the same for every number of ranks."""

    def __init__(self, lengths: Sequence[int], rows_per_batch: int, seed: int) -> None:
        self._lengths = np.asarray(lengths)
        self._rows = min(rows_per_batch, len(lengths))
        self._seed = seed
        self._epoch = -1
        self._batches: list[list[int]] = []

    @property
    def batches_per_epoch(self) -> int:
        """Whole batches; the rows left over change with the epoch."""
        return len(self._lengths) // self._rows

    def batch(self, step: int) -> list[int]:
        """Return the row indices of a step, over all ranks."""
        epoch, index = divmod(step, self.batches_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._epoch_batches(epoch)
        return self._batches[index]

    def _epoch_batches(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng(derive_seed(self._seed, "batches", epoch))
        order = rng.permutation(len(self._lengths))[: self.batches_per_epoch * self._rows]
        batches: list[list[int]] = []
        window = BUCKET_BATCHES * self._rows
        for first in range(0, len(order), window):
            rows = order[first : first + window]
            rows = rows[np.argsort(self._lengths[rows], kind="stable")]
            batches += [rows[i : i + self._rows].tolist() for i in range(0, len(rows), self._rows)]
        return [batches[i] for i in rng.permutation(len(batches))]


def rows_of_rank(rows: Sequence[RowT], rank: int, num_ranks: int) -> list[RowT]:
    """Return every `num_ranks`-th row; ranks may get one row more or less."""
    return list(rows[rank::num_ranks])
