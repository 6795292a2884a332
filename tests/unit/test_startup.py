"""Processes that import much look for garbage seldom."""

import gc
from collections.abc import Iterator

import pyarrow as pa
import pytest

from speechalign.sampling.actor_face import ActorFace
from speechalign.startup import NEW_OBJECTS


@pytest.fixture
def thresholds() -> Iterator[tuple[int, int, int]]:
    before = gc.get_threshold()
    gc.set_threshold(700, *before[1:])
    yield gc.get_threshold()
    gc.set_threshold(*before)


class Watching:
    """A stage that knows how often its actor looked for garbage while it was created."""

    def __init__(self) -> None:
        self.seen = gc.get_threshold()

    def __call__(self, batch: pa.Table) -> pa.Table:
        assert self.seen[0] == NEW_OBJECTS
        return batch


def test_an_actor_looks_for_garbage_seldom_before_its_stage_imports_anything(
    thresholds: tuple[int, int, int],
):
    table = pa.table({"a": [1]})
    assert ActorFace(Watching, {})(table).equals(table)
    assert gc.get_threshold() == (NEW_OBJECTS, *thresholds[1:])
