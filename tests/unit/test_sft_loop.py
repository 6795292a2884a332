"""The loop of a supervised training on one rank: resume, and batches that are not finite."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from speechalign.artifacts import manifest_facts
from speechalign.config.training import SftArConfig
from speechalign.errors import ConfigError
from speechalign.training import sft
from speechalign.training.metrics import read_metrics
from speechalign.training.sft import (
    IDENTITY,
    identity_of,
    run_training,
    train_worker,
    work_folder,
)
from speechalign.training.sft_ar import ArTask
from tests.online_toy import a_process_group
from tests.tiny_stack import TinyStack, build_tiny_stack

pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = 4


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyStack]:
    with a_process_group():
        yield build_tiny_stack(tmp_path_factory.mktemp("stack"))


def a_config(stack: TinyStack, output: Path, **changes: Any) -> SftArConfig:
    values: dict[str, Any] = {
        "golden": stack.golden,
        "output": output,
        "num_steps": STEPS,
        "rows_per_step": 4,
        "log_every": 1,
        "model": {"num_layers": 1, "hidden_size": 32, "num_heads": 2, "prefix_frames": 4},
        "engine": {"learning_rate": 1e-3, "zero_stage": 0, "num_accumulated": 2},
        "workers": {"num_workers": 1},
    }
    return SftArConfig.model_validate(values | changes)


def run(config: SftArConfig) -> list[dict[str, float]]:
    train_worker({"config": config.model_dump(mode="json")})
    return read_metrics(work_folder(config) / "metrics.jsonl")


def logged(rows: list[dict[str, float]]) -> list[float]:
    return [row["step"] for row in rows if "learning_rate" in row]


def test_a_checkpoint_of_other_settings_is_kept_and_named(
    stack: TinyStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def workers(worker: Callable[[Any], None], settings: Any, *others: object) -> None:
        worker(settings)

    monkeypatch.setattr(sft, "run_workers", workers)
    config = a_config(stack, tmp_path / "ar")
    run_training(config)
    shutil.rmtree(config.output)
    before = manifest_facts(work_folder(config) / "checkpoint")

    engine = config.engine.model_copy(update={"learning_rate": 1.0})
    other = config.model_copy(update={"seed": 1, "engine": engine})
    with pytest.raises(ConfigError, match=r"another engine\.learning_rate, seed; .* or remove"):
        run_training(other)
    assert manifest_facts(work_folder(config) / "checkpoint") == before

    shutil.move(work_folder(config) / "metrics.jsonl", tmp_path)
    workers_of = config.workers.model_copy(update={"threads_per_worker": 2})
    slower = {"checkpoint_every": 3, "heldout_every": 1, "workers": workers_of}
    run_training(config.model_copy(update=slower))
    assert not (work_folder(config) / "metrics.jsonl").read_text()  # every step is behind it
    assert manifest_facts(config.output)[IDENTITY] == identity_of(config)


def test_a_batch_that_is_not_finite_counts_and_the_last_step_is_looked_at(
    stack: TinyStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loss = ArTask.loss

    def once_infinite(
        self: ArTask, model: nn.Module, rows: list[int], step: int
    ) -> tuple[Tensor, Tensor]:
        total, count = loss(self, model, rows, step)
        return (total * torch.inf if step == 2 else total), count

    monkeypatch.setattr(ArTask, "loss", once_infinite)
    rows = run(a_config(stack, tmp_path / "ar"))
    assert logged(rows) == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "heldout_loss" in row] == [STEPS]
    assert manifest_facts(tmp_path / "ar-work" / "checkpoint")["step_index"] == STEPS
