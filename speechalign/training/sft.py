"""One model from one set of data: the AR and the NAR model, and the reward model.

The folder `<output>-work` holds checkpoints and metrics while it runs; `output` appears when the
training is done. The same command resumes from the newest checkpoint.
"""

import logging
import time
from pathlib import Path
from typing import Any, Literal, Protocol, assert_never

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from speechalign.artifacts import is_committed, verify_folder
from speechalign.config.load import config_hash
from speechalign.config.training import (
    RewardModelConfig,
    SftArConfig,
    SftNarConfig,
    TrainingConfig,
)
from speechalign.errors import Diverged, Stopped
from speechalign.seeds import derive_seed
from speechalign.training.batches import rows_of_rank
from speechalign.training.best_weights import BestWeights
from speechalign.training.checkpoint import checkpoint_folder, has_checkpoint, stop_is_asked
from speechalign.training.engine import Engine, barrier, global_mean, global_sum, world
from speechalign.training.launch import run_workers
from speechalign.training.metrics import MetricsWriter

logger = logging.getLogger(__name__)

MAX_BAD_UPDATES = 3
"""Batches in a row whose loss is not finite, after which the run stops."""


class Task(Protocol):
    """What a supervised job trains, and on what."""

    model: nn.Module
    unit: Literal["tokens", "codes", "pairs"]
    """What `loss` counts; metrics have a rate of them."""
    keeps_best: bool
    """Whether the result is of the lowest `heldout_loss`, and not of the last update."""

    def rows(self, step: int) -> list[int]:
        """Return the training rows of a micro-batch, over all ranks."""
        ...

    def loss(self, model: nn.Module, rows: list[int], step: int) -> tuple[Tensor, Tensor]:
        """Return (summed loss, number of terms) of the rows of this rank."""
        ...

    def heldout(self, model: nn.Module) -> dict[str, float]:
        """Return measurements of held-out rows."""
        ...

    def save(self, folder: Path, model: nn.Module, facts: dict[str, Any]) -> None:
        """Commit the trained model."""
        ...


def run_training(config: TrainingConfig) -> Path:
    """Train and commit a model; return its folder. A finished one is kept.

    Raises:
        ConfigError: the data cannot be read, or does not fit the model.
        Diverged: the loss stopped being finite.
    """
    if is_committed(config.output):
        verify_folder(config.output)
        logger.info("%s: finished earlier", config.output)
        return config.output
    build_task(config)  # a mistake in the data shows here, before any worker starts
    work = work_folder(config)
    settings = {"config": _with_whole_paths(config).model_dump(mode="json")}
    run_workers(train_worker, settings, config.workers, work / "ray")
    return config.output


def _with_whole_paths(config: TrainingConfig) -> TrainingConfig:
    """Workers have another working directory."""
    whole: dict[str, object] = {}
    for name, value in config:
        if isinstance(value, Path):
            whole[name] = value.resolve()
        elif isinstance(value, tuple) and all(isinstance(part, Path) for part in value):
            whole[name] = tuple(Path(part).resolve() for part in value)
    return config.model_copy(update=whole)


def work_folder(config: TrainingConfig) -> Path:
    """Return where checkpoints and metrics are."""
    return config.output.with_name(f"{config.output.name}-work")


def build_task(config: TrainingConfig) -> Task:
    """Return the task that a config names."""
    from speechalign.training.reward_model import RewardTask
    from speechalign.training.sft_ar import ArTask
    from speechalign.training.sft_nar import NarTask

    torch.manual_seed(derive_seed(config.seed, "weights", config.kind))
    match config:
        case SftArConfig():
            return ArTask(config)
        case SftNarConfig():
            return NarTask(config)
        case RewardModelConfig():
            return RewardTask(config)
        case _:
            assert_never(config)


def train_worker(settings: dict[str, Any]) -> None:
    """Train on this rank; rank 0 writes metrics and the model."""
    config: TrainingConfig = TypeAdapter(TrainingConfig).validate_python(settings["config"])
    task = build_task(config)
    num_micro = config.num_steps * config.engine.num_accumulated
    engine = Engine(task.model, config.engine, config.num_steps)
    work = work_folder(config)
    checkpoint = work / "checkpoint"
    if has_checkpoint(checkpoint):
        verify_folder(checkpoint)
        engine.load(checkpoint)
        logger.info("resumed after step %d", engine.step_index)
    first = engine.step_index * config.engine.num_accumulated
    best = BestWeights(work / "best", is_resumed=engine.step_index > 0) if task.keeps_best else None
    with MetricsWriter(work, is_writer=world()[0] == 0, resumed_at=engine.step_index) as metrics:
        loop = _Loop(config, task, engine, metrics, best)
        for micro in range(first, num_micro):
            loop.step(micro)
            if (micro + 1) % config.engine.num_accumulated == 0:
                loop.after_update(checkpoint)
    with engine.whole_weights() as model:
        if world()[0] == 0:
            facts = {"config_hash": config_hash(config), "num_steps": config.num_steps}
            if best is not None:
                facts["best_step"] = best.load_into(model)
            task.save(config.output, model, facts)
    barrier()


class _Loop:
    """One update after another, with what it says of itself."""

    def __init__(
        self,
        config: TrainingConfig,
        task: Task,
        engine: Engine,
        metrics: MetricsWriter,
        best: BestWeights | None,
    ) -> None:
        self._config, self._task, self._engine, self._metrics = config, task, engine, metrics
        self._best = best
        self._total = torch.zeros(())
        self._count = torch.zeros(())
        self._bad_updates = 0
        self._since = time.monotonic()

    def step(self, micro: int) -> None:
        """Train on one micro-batch."""
        rank, num_ranks = world()
        rows = rows_of_rank(self._task.rows(micro), rank, num_ranks)
        with self._engine.autocast():
            total, count = self._task.loss(self._engine.module, rows, micro)
        if not torch.isfinite(global_sum(total)):
            self._skip(micro)
        else:
            self._bad_updates = 0
            self._total += total.detach().cpu()
            self._count += count.cpu()
            self._engine.update(global_mean(total, count))

    def after_update(self, checkpoint: Path) -> None:
        """Log, evaluate and save when it is time.

        Raises:
            Stopped: the driver was asked to end; everything is saved.
        """
        step, config = self._engine.step_index, self._config
        if step % config.log_every == 0:
            self._log(step)
        if step % config.heldout_every == 0 or step == config.num_steps:
            self._look(step)
        asked = stop_is_asked(checkpoint.parent, self._engine.device)
        if asked or step % config.checkpoint_every == 0 or step == config.num_steps:
            with checkpoint_folder(checkpoint, {"step_index": step}) as partial:
                self._engine.save(partial)
        if asked:
            logger.info("saved after step %d, and stopped", step)
            raise Stopped

    def _look(self, step: int) -> None:
        self._engine.unwrapped.eval()
        with torch.no_grad(), self._engine.autocast():
            values = self._task.heldout(self._engine.module)
        self._engine.unwrapped.train()
        self._metrics.write(step, values)
        if self._best is not None:
            self._best.offer(self._engine, values["heldout_loss"])

    def _log(self, step: int) -> None:
        total, count = global_sum(self._total), global_sum(self._count)
        elapsed_s = time.monotonic() - self._since
        values = {
            "loss": float(total / count),
            f"{self._task.unit}_per_s": float(count / elapsed_s),
            "learning_rate": self._engine.learning_rate,
        }
        self._metrics.write(step, values)
        if world()[0] == 0:
            logger.info("step %d/%d %s", step, self._config.num_steps, values)
        self._total, self._count = torch.zeros(()), torch.zeros(())
        self._since = time.monotonic()

    def _skip(self, micro: int) -> None:
        self._bad_updates += 1
        self._engine.discard_gradients()
        if self._bad_updates >= MAX_BAD_UPDATES:
            raise Diverged(
                f"the loss was not finite for {MAX_BAD_UPDATES} batches in a row, until batch "
                f"{micro}; lower the learning rate, or look at the metrics beside the checkpoint"
            )
