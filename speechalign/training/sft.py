"""One model from one set of data: the AR and the NAR model, and the reward model.

The folder `<output>-work` holds checkpoints and metrics while it runs; `output` appears when the
training is done. The same command resumes from the newest checkpoint.
"""

import hashlib
import json
import logging
import time
from pathlib import Path
from typing import Any, Literal, Protocol, assert_never

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from speechalign.artifacts import MANIFEST, is_committed, refuse_foreign, sha256_of, verify_folder
from speechalign.config.training import (
    RewardModelConfig,
    SftArConfig,
    SftNarConfig,
    TrainingConfig,
)
from speechalign.errors import ConfigError, Diverged, Stopped
from speechalign.locks import held_output
from speechalign.seeds import derive_seed
from speechalign.training.batches import rows_of_rank
from speechalign.training.best_weights import BestWeights
from speechalign.training.checkpoint import checkpoint_folder, has_checkpoint, stop_is_asked
from speechalign.training.engine import Engine, barrier, global_mean, global_sum, world
from speechalign.training.launch import run_workers
from speechalign.training.metrics import MetricsWriter

logger = logging.getLogger(__name__)

IDENTITY = "identity"
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
        ConfigError: the data cannot be read, or does not fit the model, or the output is
            something else, perhaps of other data or settings.
        RunLocked: another process trains it.
        Diverged: the loss stopped being finite.
    """
    if is_committed(config.output):  # nobody writes it any more, and its folder may be read-only
        return _train_or_keep(config)
    with held_output(config.output):
        return _train_or_keep(config)


def _train_or_keep(config: TrainingConfig) -> Path:
    if is_committed(config.output):
        if verify_folder(config.output).get(IDENTITY) != identity_of(config):
            raise ConfigError(
                f"{config.output} holds what other data or settings made; name another output, or "
                "remove it"
            )
        logger.info("%s: finished earlier", config.output)
        return config.output
    refuse_foreign(config.output)
    build_task(config)  # a mistake in the data shows here, before any worker starts
    work = work_folder(config)
    settings = {"config": _with_whole_paths(config).model_dump(mode="json")}
    run_workers(train_worker, settings, config.workers, work / "ray")
    return config.output


def identity_of(config: TrainingConfig) -> str:
    """Return what a checkpoint and a finished model share with the training that they are of.

    Settings, and the content of files and of committed folders: where they are does not matter.
    """
    own: dict[str, Any] = config.model_dump(mode="json", exclude={"output", "log_every"})
    for name, value in config:
        if name in own and isinstance(value, Path):
            own[name] = _content_of(value)
        elif name in own and isinstance(value, tuple):
            own[name] = [_content_of(v) if isinstance(v, Path) else v for v in value]
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]


def _content_of(path: Path) -> str:
    file = path / MANIFEST if path.is_dir() else path
    return sha256_of(file) if file.is_file() else ""  # what was learned from may be gone


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
    identity = identity_of(config)
    if has_checkpoint(checkpoint):
        if verify_folder(checkpoint).get(IDENTITY) == identity:
            engine.load(checkpoint)
            logger.info("resumed after step %d", engine.step_index)
        else:
            logger.warning("%s is of other data or settings; starting over", checkpoint)
    first = engine.step_index * config.engine.num_accumulated
    best = BestWeights(work / "best", is_resumed=engine.step_index > 0) if task.keeps_best else None
    with MetricsWriter(work, is_writer=world()[0] == 0, resumed_at=engine.step_index) as metrics:
        loop = _Loop(config, task, engine, metrics, best)
        for micro in range(first, num_micro):
            loop.step(micro)
            if (micro + 1) % config.engine.num_accumulated == 0:
                loop.after_update(checkpoint, identity)
    with engine.whole_weights() as model:
        if world()[0] == 0:
            facts: dict[str, Any] = {IDENTITY: identity, "num_steps": config.num_steps}
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
        self._total, self._count = self._zeros()
        self._bad_updates = 0
        self._since = time.monotonic()

    def step(self, micro: int) -> None:
        """Train on one micro-batch."""
        rank, num_ranks = world()
        rows = rows_of_rank(self._task.rows(micro), rank, num_ranks)
        with self._engine.autocast():
            total, count = self._task.loss(self._engine.module, rows, micro)
        if not torch.isfinite(global_sum(total)):
            self._pass_over(micro)
        else:
            self._bad_updates = 0
            self._total += total.detach()
            self._count += count
            self._engine.update(global_mean(total, count))

    def after_update(self, checkpoint: Path, identity: str) -> None:
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
            with checkpoint_folder(checkpoint, {"step_index": step, IDENTITY: identity}) as partial:
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
        self._total, self._count = self._zeros()
        self._since = time.monotonic()

    def _zeros(self) -> tuple[Tensor, Tensor]:
        """Return sums to begin with, where the ranks can add them up."""
        total, count = torch.zeros(2, device=self._engine.device)
        return total, count

    def _pass_over(self, micro: int) -> None:
        self._bad_updates += 1
        self._engine.pass_over()
        if self._bad_updates >= MAX_BAD_UPDATES:
            raise Diverged(
                f"the loss was not finite for {MAX_BAD_UPDATES} batches in a row, until batch "
                f"{micro}; lower the learning rate, or look at the metrics beside the checkpoint"
            )
