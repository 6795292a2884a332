"""The order in which rows are trained on, and which rank gets which."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from speechalign.seeds import derive_seed

RowT = TypeVar("RowT")
BUCKET_BATCHES = 32
"""Batches are cut from windows of this many, sorted by length: little padding, much chance."""


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
