"""The state of a training between two updates: whole on disk, or the one before it is."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from speechalign.artifacts import commit_folder, is_committed, partial_folder, recover_folder
from speechalign.training.engine import barrier, global_sum, world
from speechalign.training.stopping import STOP_REQUEST


@contextmanager
def checkpoint_folder(target: Path, facts: Mapping[str, Any]) -> Iterator[Path]:
    """Yield the folder that all ranks write into; it replaces `target` when all have.

    Every rank must enter. A kill in between leaves the former checkpoint.
    """
    is_first = world()[0] == 0
    if is_first:
        partial_folder(target)
    barrier()
    partial = target.with_name(f".{target.name}.partial")
    yield partial
    barrier()
    if is_first:
        commit_folder(partial, target, facts)
    barrier()


def has_checkpoint(target: Path) -> bool:
    """Whether there is one to go on from; every rank must call it."""
    if world()[0] == 0:
        recover_folder(target)
    barrier()
    return is_committed(target)


def stop_is_asked(work: Path, device: torch.device) -> bool:
    """Whether the driver wants the training saved and ended; every rank must call it.

    Args:
        work: the folder that the driver leaves its request in.
        device: of the process group.
    """
    # One rank looks for all: they would see the file between different updates.
    asked = torch.zeros((), device=device)
    if world()[0] == 0 and (work / STOP_REQUEST).exists():
        asked += 1
    return bool(global_sum(asked))
