"""One model from one set of data: the AR and the NAR model, and the reward model.

The folder `<output>-work` holds checkpoints and metrics while it runs; `output` appears when the
training is done. The same command resumes from the newest checkpoint.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, assert_never

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from speechalign.artifacts import (
    MANIFEST,
    is_committed,
    manifest_facts,
    recover_folder,
    refuse_foreign,
    sha256_of,
    verify_folder,
)
from speechalign.config.training import (
    RewardModelConfig,
    SftArConfig,
    SftNarConfig,
    TrainingConfig,
    WorkersConfig,
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

IDENTITY, LEARNED = "identity", "learned"
CHECKPOINT = "checkpoint"
PACING: Any = {
    **dict.fromkeys(("output", "log_every", "checkpoint_every"), True),
    "workers": set(WorkersConfig.model_fields) - {"num_workers"},
}
"""Settings that do not change what is learned, and so may differ from the checkpoint's."""
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
        ConfigError: the data cannot be read, or does not fit the model, or the cluster is too
            small, or the output or its checkpoint is of other data or settings.
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
    _refuse_other_checkpoint(config)
    settings = {"config": _with_whole_paths(config).model_dump(mode="json")}
    run_workers(train_worker, settings, config.workers, work_folder(config) / "ray")
    return config.output


def identity_of(config: TrainingConfig) -> str:
    """Return what a checkpoint and a finished model share with the training that they are of."""
    return _identity_of(_learned_of(config))


def _identity_of(learned: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(learned, sort_keys=True).encode()).hexdigest()[:16]


def _learned_of(config: TrainingConfig) -> dict[str, Any]:
    """Return what the result depends on.

    Settings, and the content of files and of committed folders: where they are does not matter.
    """
    own: dict[str, Any] = config.model_dump(mode="json", exclude=PACING)
    if config.kind != "reward_model":  # which keeps the best of its looks
        del own["heldout_every"]
    for name, value in config:
        if name in own and isinstance(value, Path):
            own[name] = _content_of(value)
        elif name in own and isinstance(value, tuple):
            own[name] = [_content_of(v) if isinstance(v, Path) else v for v in value]
    return own


def _refuse_other_checkpoint(config: TrainingConfig) -> None:
    """Keep the checkpoint of a training with other settings: the next save would replace it."""
    checkpoint = work_folder(config) / CHECKPOINT
    recover_folder(checkpoint)
    if not is_committed(checkpoint):
        return
    facts = manifest_facts(checkpoint)
    learned = _learned_of(config)
    if facts.get(IDENTITY) == _identity_of(learned):
        return
    changed = ", ".join(_changed(learned, facts.get(LEARNED, {})))
    raise ConfigError(
        f"{checkpoint} is of a training with another {changed}; go on with what it had (its "
        f"{MANIFEST} tells), or remove {work_folder(config)} to begin anew"
    )


def _changed(now: Mapping[str, Any], before: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(now.keys() | before.keys()):
        value, former = now.get(name), before.get(name)
        if isinstance(value, dict) and isinstance(former, dict):
            yield from (f"{name}.{part}" for part in _changed(value, former))
        elif value != former:
            yield name


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
    checkpoint = work / CHECKPOINT
    learned = _learned_of(config)
    shared = {IDENTITY: _identity_of(learned), LEARNED: learned}
    if has_checkpoint(checkpoint):  # of this training: the driver has looked
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
                loop.after_update(checkpoint, shared)
    with engine.whole_weights() as model:
        if world()[0] == 0:
            facts = {IDENTITY: shared[IDENTITY], "num_steps": config.num_steps}
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

    def after_update(self, checkpoint: Path, shared: Mapping[str, Any]) -> None:
        """Log, evaluate and save when it is time.

        Args:
            checkpoint: the folder.
            shared: what it and a training that goes on from it have in common.

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
            with checkpoint_folder(checkpoint, {"step_index": step, **shared}) as partial:
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
