"""Which failures of training workers are worth another start."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
from ray._private.state import state
from ray.train import ControllerError, WorkerGroupError

from speechalign.artifacts import committed_folder
from speechalign.config.preference_training import PreferenceTrainingConfig
from speechalign.config.training import SftArConfig, WorkersConfig
from speechalign.errors import (
    ConfigError,
    CorruptArtifact,
    DataError,
    Diverged,
    LogprobMismatch,
    SpeechalignError,
)
from speechalign.rows import pairs_to_table
from speechalign.training.launch import run_workers
from speechalign.training.preference import TrainingPaths, train_on_pairs
from speechalign.training.sft import run_training
from speechalign.training.stored_pairs import PAIRS
from tests.builders import some_pairs
from tests.tiny_stack import build_tiny_stack

pytestmark = pytest.mark.filterwarnings("ignore")

DIED = RuntimeError("connection reset by peer")


class Starts:
    """In place of Ray Train: each start fails with the next error, until there is none."""

    def __init__(self, *errors: Exception) -> None:
        self.count = 0
        self._errors = errors

    def __call__(self, *_: object, **options: Any) -> "Starts":
        self.max_failures = options["run_config"].failure_config.max_failures
        return self

    def fit(self) -> None:
        self.count += 1
        if self.count <= len(self._errors):
            error = self._errors[self.count - 1]
            is_rays = isinstance(error, ControllerError)
            raise error if is_rays else WorkerGroupError("a worker failed", {0: error})


StartsOf = Callable[..., Starts]


@pytest.fixture
def starts_of(monkeypatch: pytest.MonkeyPatch) -> StartsOf:
    def patch(*errors: Exception) -> Starts:
        starts = Starts(*errors)
        monkeypatch.setattr("ray.train.torch.TorchTrainer", starts)
        return starts

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: None)
    return patch


def nothing(settings: dict[str, Any]) -> None:
    del settings


@pytest.mark.parametrize(
    "kind", [ConfigError, DataError, CorruptArtifact, Diverged, LogprobMismatch]
)
def test_what_a_worker_raised_on_purpose_is_not_tried_again(
    starts_of: StartsOf, tmp_path: Path, kind: type[SpeechalignError]
):
    starts = starts_of(kind("as before"), kind("as before"))
    with pytest.raises(kind, match="as before"):
        run_workers(nothing, {}, WorkersConfig(max_failures=2), tmp_path / "ray")
    assert (starts.count, starts.max_failures) == (1, 0)


def test_workers_that_die_are_started_again_with_data_that_is_planned_anew(
    starts_of: StartsOf, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    starts, plans = starts_of(DIED, DIED), list[int]()

    def datasets() -> dict[str, Any]:
        plans.append(starts.count)
        return {}

    run_workers(nothing, {}, WorkersConfig(max_failures=2), tmp_path / "ray", datasets)
    assert (starts.count, plans) == (3, [0, 1, 2])
    assert caplog.text.count("starting again from the last checkpoint") == 2


def test_workers_that_die_once_too_often_end_the_training(starts_of: StartsOf, tmp_path: Path):
    starts = starts_of(DIED, DIED, DIED)
    with pytest.raises(RuntimeError, match="training workers died"):
        run_workers(nothing, {}, WorkersConfig(max_failures=1), tmp_path / "ray")
    assert starts.count == 2


def test_workers_that_die_while_they_start_keep_their_place_and_end_the_training(
    starts_of: StartsOf, tmp_path: Path
):
    starts = starts_of(ControllerError(DIED), DIED)
    with pytest.raises(RuntimeError, match="training workers died"):
        run_workers(nothing, {}, WorkersConfig(max_failures=2), tmp_path / "ray")
    assert starts.count == 1


def test_workers_that_can_never_start_are_refused(
    starts_of: StartsOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    starts, many = starts_of(), WorkersConfig(num_workers=500)
    with pytest.raises(ConfigError, match="wants 500 CPUs for 500 workers, the cluster has 2"):
        run_workers(nothing, {}, many, tmp_path / "ray")
    with pytest.raises(ConfigError, match="wants 1 GPUs for 2 workers, the cluster has 0"):
        run_workers(nothing, {}, WorkersConfig(gpus_per_worker=0.5), tmp_path / "ray")
    assert not starts.count
    most = {"CPU": 500}  # what an autoscaler may add
    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: most)
    run_workers(nothing, {}, many, tmp_path / "ray")
    assert starts.count == 1


def supervised(folder: Path) -> None:
    values: dict[str, Any] = {
        "golden": build_tiny_stack(folder / "stack").golden,
        "output": folder / "ar",
        "num_steps": 4,
        "model": {"num_layers": 1, "hidden_size": 32, "num_heads": 2, "prefix_frames": 4},
    }
    run_training(SftArConfig.model_validate(values))


def on_pairs(folder: Path) -> None:
    policy = build_tiny_stack(folder / "stack").ar
    with committed_folder(folder / "pairs", {}) as partial:
        pq.write_table(pairs_to_table(some_pairs(20)), partial / PAIRS)
    paths = TrainingPaths(
        policy=policy, reference=policy, pairs=folder / "pairs", output=folder / "policy"
    )
    train_on_pairs(PreferenceTrainingConfig(), paths)


@pytest.mark.parametrize("train", [supervised, on_pairs])
def test_a_training_that_diverges_is_started_once(
    starts_of: StartsOf, tmp_path: Path, train: Callable[[Path], None]
):
    starts = starts_of(Diverged("not finite"), Diverged("not finite"))
    with pytest.raises(Diverged, match="not finite"):
        train(tmp_path)
    assert (starts.count, starts.max_failures) == (1, 0)
