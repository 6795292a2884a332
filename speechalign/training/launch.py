"""Start Ray Train workers, show their progress, bring their errors home as they were raised."""

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speechalign.config.training import WorkersConfig
from speechalign.errors import ConfigError, SpeechalignError, Stopped
from speechalign.resources import possible_resources
from speechalign.startup import collect_seldom
from speechalign.training.stopping import STOP_REQUEST, saved_when_stopped

if TYPE_CHECKING:
    from ray.data import Dataset

logger = logging.getLogger(__name__)

PROGRESS_EVERY_S = 10.0

WorkerFunction = Callable[[dict[str, Any]], None]
"""Runs on every worker; what it returns is dropped, what it writes is the result."""


def run_workers(
    train: WorkerFunction,
    settings: dict[str, Any],
    workers: WorkersConfig,
    storage: Path,
    datasets: "Callable[[], Mapping[str, Dataset]] | None" = None,
) -> None:
    """Run a function on every worker of a torch process group, and wait for all.

    Workers that die in training are started again, `workers.max_failures` times; what a worker
    raised on purpose it would raise again, and ends the training.

    Args:
        train: a module-level function; it finds the group through torch.distributed.
        settings: plain values for the function.
        workers: how many, and what each needs.
        storage: a folder that Ray Train may keep its state in; `metrics.jsonl` beside it is
            followed for progress.
        datasets: plans what the workers read, by name, anew for every start; every worker gets
            its shard, block by block in order.

    Raises:
        ConfigError: the cluster is too small for the workers.
        SpeechalignError: what a worker raised, of the same type.
        RuntimeError: the workers died of something else once too often.
        Stopped: this process was asked to end, and the workers have saved, or had their time.
    """
    from ray.train import ControllerError

    _check_resources(workers)
    for attempt in range(workers.max_failures + 1):
        try:
            _start(train, settings, workers, storage, datasets() if datasets else {})
        except SpeechalignError:
            raise
        except RuntimeError as error:
            # Ray Train never lets go of the CPUs of workers that died while they started, and the
            # next ones could wait for them for ever: it calls that an error of its controller.
            if attempt == workers.max_failures or isinstance(error.__cause__, ControllerError):
                raise
            logger.warning("%s; starting again from the last checkpoint", error)
        else:
            return


def _check_resources(workers: WorkersConfig) -> None:
    """Refuse workers that can never start; Ray Train itself would wait for ever."""
    available = possible_resources()
    for kind, each in (("CPU", workers.cpus_per_worker), ("GPU", workers.gpus_per_worker)):
        wanted = workers.num_workers * each
        found = available.get(kind, 0.0)
        if wanted > found + 1e-6:
            raise ConfigError(
                f"training wants {wanted:g} {kind}s for {workers.num_workers} workers, the cluster "
                f"has {found:g}; lower workers.num_workers or {kind.lower()}s_per_worker, or "
                "join a larger cluster (RAY_ADDRESS)"
            )


def _start(
    train: WorkerFunction,
    settings: dict[str, Any],
    workers: WorkersConfig,
    storage: Path,
    datasets: "Mapping[str, Dataset]",
) -> None:
    from ray.data import ExecutionOptions
    from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    uses_gpu = workers.gpus_per_worker > 0
    resources = {"CPU": workers.cpus_per_worker}
    if uses_gpu:
        resources["GPU"] = workers.gpus_per_worker
    storage.mkdir(parents=True, exist_ok=True)
    trainer = TorchTrainer(
        _Worker(train, workers.threads_per_worker),
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=workers.num_workers,
            use_gpu=uses_gpu,
            resources_per_worker=resources,
            label_selector=workers.label_selector or None,
        ),
        datasets=dict(datasets),
        dataset_config=DataConfig(
            execution_options=ExecutionOptions(preserve_order=True), enable_shard_locality=False
        ),
        torch_config=TorchConfig(backend="nccl" if uses_gpu else "gloo"),
        run_config=RunConfig(
            name="ray-train",
            storage_path=str(storage.resolve()),
            failure_config=FailureConfig(
                max_failures=0,  # it would start again whatever a worker raised
                # A dataset would begin again with its first block: who planned it plans anew.
                max_preemption_failures=0 if datasets else -1,
            ),
        ),
    )
    stops = saved_when_stopped(storage.parent / STOP_REQUEST)
    try:
        with _progress(storage.parent / "metrics.jsonl"), stops:
            trainer.fit()
    except Exception as error:  # Ray wraps a worker's error in several types of its own
        original = _original(error)
        if original is not None:
            raise original from None
        raise RuntimeError(f"training workers died: {error}") from error


class _Worker:
    """Limits the threads of a worker before torch starts any."""

    def __init__(self, train: WorkerFunction, num_threads: int) -> None:
        self._train = train
        self._num_threads = num_threads
        self.__name__ = train.__name__

    def __call__(self, settings: dict[str, Any]) -> None:
        os.environ["OMP_NUM_THREADS"] = str(self._num_threads)
        collect_seldom()
        import torch

        torch.set_num_threads(self._num_threads)
        try:
            self._train(settings)
        except Stopped:  # the driver knows; an error would read like a failure
            return


@contextmanager
def _progress(metrics: Path) -> Iterator[None]:
    """Log the newest line of the metrics from time to time."""
    finished = threading.Event()

    def follow() -> None:
        shown = ""
        while not finished.wait(PROGRESS_EVERY_S):
            lines = metrics.read_text().splitlines() if metrics.exists() else []
            if lines and lines[-1] != shown:
                shown = lines[-1]
                logger.info("training %s", shown)

    thread = threading.Thread(target=follow, name="training-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def _original(error: BaseException) -> SpeechalignError | None:
    """Find the speechalign error among causes and Ray's per-worker failures."""
    seen: set[int] = set()
    waiting: list[object] = [error]
    while waiting:
        current = waiting.pop()
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        if isinstance(current, SpeechalignError):
            return current
        seen.add(id(current))
        waiting += [current.__cause__, current.__context__, getattr(current, "cause", None)]
        waiting += list(getattr(current, "worker_failures", {}).values())
    return None
