"""What a training leaves of itself, when it was killed and goes on."""

import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from speechalign.training.metrics import MetricsWriter, read_metrics
from speechalign.training.running_means import RunningMeans


def write(folder: Path, steps: range, loss: float, resumed_at: int | None = None) -> None:
    with MetricsWriter(folder, resumed_at=resumed_at) as metrics:
        for step in steps:
            metrics.write(step, {"loss": loss})


def test_a_resumed_training_drops_what_comes_after_its_checkpoint(tmp_path: Path):
    write(tmp_path, range(1, 6), 9.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while it wrote
    write(tmp_path, range(4, 8), 1.0, resumed_at=3)
    rows = [(row["step"], row["loss"]) for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert rows == [(1, 9.0), (2, 9.0), (3, 9.0), (4, 1.0), (5, 1.0), (6, 1.0), (7, 1.0)]


def test_a_training_without_a_checkpoint_starts_its_metrics_anew(tmp_path: Path):
    write(tmp_path, range(1, 4), 9.0, resumed_at=0)
    write(tmp_path, range(1, 3), 1.0, resumed_at=0)
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1.0, 1.0]


def test_metrics_are_appended_unless_told_to_resume(tmp_path: Path):
    write(tmp_path, range(1, 3), 9.0)
    write(tmp_path, range(1, 2), 1.0)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 1]


def test_what_was_not_measured_is_left_out(tmp_path: Path):
    with MetricsWriter(tmp_path) as metrics:
        metrics.write(1, {"loss": 1.0, "grad_norm": float("nan"), "stopped": "no"})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0, "stopped": "no"}]


def test_the_largest_of_nothing_is_not_zero():
    means = RunningMeans(["loss"], ["seen", "unseen"])
    means.add("loss", torch.tensor([1.0, 3.0]))
    means.see("seen", torch.tensor([-2.0, -1.0]))
    means.see("unseen", torch.tensor([]))
    assert means.over_ranks(torch.device("cpu")) == {"loss": 2.0, "seen": -1.0}


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_drops_the_same_steps(tmp_path: Path):
    write(tmp_path, range(1, 6), 9.0)
    time.sleep(1.1)  # TensorBoard sorts the files by name, which has whole seconds
    write(tmp_path, range(4, 6), 1.0, resumed_at=3)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    points = [(event.step, event.value) for event in board.Scalars("loss")]
    assert points == [(1, 9.0), (2, 9.0), (3, 9.0), (4, 1.0), (5, 1.0)]
