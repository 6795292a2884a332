"""What an actor does with the errors of its stage, and the driver with those of its actors."""

import os
from collections.abc import Callable

import pyarrow as pa
import pytest
from ray.exceptions import RayActorError

from speechalign.config.sampling import PoolConfig
from speechalign.errors import DataError, EngineDead
from speechalign.sampling.actor_face import ActorFace
from speechalign.sampling.pipeline import Stage, errors_of_actors

BATCH = pa.table({"x": [1]})


class Exited(BaseException):
    pass


@pytest.fixture
def no_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(code: int) -> None:
        raise Exited(code)

    monkeypatch.setattr(os, "_exit", leave)


def raises(error: Exception) -> Callable[[pa.Table], pa.Table]:
    def stage(batch: pa.Table) -> pa.Table:
        del batch
        raise error

    return stage


@pytest.mark.usefixtures("no_exit")
def test_a_dead_engine_ends_its_process_and_other_errors_are_raised(
    caplog: pytest.LogCaptureFixture,
):
    with pytest.raises(Exited, match="1"):
        ActorFace(raises, {"error": EngineDead("burnt out")})(BATCH)
    assert "burnt out" in caplog.text
    with pytest.raises(DataError, match="bad row"):
        ActorFace(raises, {"error": DataError("bad row")})(BATCH)


def test_a_stage_whose_actors_die_is_named():
    stages = [
        Stage(name=name, stage=raises, arguments={}, pool=PoolConfig())
        for name in ("sample", "mine", "other")
    ]
    died = "The actor died unexpectedly.\n\tclass_name: MapWorker(MapBatches(mine))"
    with (
        pytest.raises(EngineDead, match="stage 'mine': its process died"),
        errors_of_actors(stages),
    ):
        raise RayActorError(error_msg=died)
    with (
        pytest.raises(EngineDead, match="'sample or mine or other'"),
        errors_of_actors(stages),
    ):
        raise RayActorError
