"""Pairs as a run has stored them, and which of them are held out."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from speechalign.artifacts import verify_folder
from speechalign.errors import DataError
from speechalign.rows import pairs_from_table
from speechalign.seeds import derive_seed
from speechalign.types import PairKind, PreferencePair

PAIRS = "pairs.parquet"


def read_pairs(folder: Path) -> list[PreferencePair]:
    """Return the pairs of a committed folder."""
    verify_folder(folder)
    return pairs_from_table(pq.read_table(folder / PAIRS))


def read_both_sides(folder: Path) -> list[PreferencePair]:
    """Return the pairs of a committed folder.

    Raises:
        DataError: some are labelled answers, with nothing to be compared with.
    """
    pairs = read_pairs(folder)
    num_labelled = sum(pair.kind is PairKind.LABELLED for pair in pairs)
    if num_labelled:
        raise DataError(
            f"{num_labelled} of the {len(pairs)} pairs of {folder} are labelled answers without "
            "another one; a reward model compares two: make golden or ranked pairs"
        )
    return pairs


def split_pairs(
    pairs: Sequence[PreferencePair], heldout_share: float, seed: int
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Return (training, held-out) pairs; the pairs of one prompt stay together."""
    limit = round(heldout_share * 10_000)
    train: list[PreferencePair] = []
    heldout: list[PreferencePair] = []
    for pair in pairs:
        is_heldout = derive_seed(seed, "heldout", pair.prompt_id) % 10_000 < limit
        (heldout if is_heldout else train).append(pair)
    if not heldout:  # a handful of pairs, by chance all on one side
        heldout = [pair for pair in train if pair.prompt_id == train[-1].prompt_id]
        train = [pair for pair in train if pair.prompt_id != train[-1].prompt_id]
    return train, heldout
