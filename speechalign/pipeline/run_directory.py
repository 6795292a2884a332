"""A run on disk: who holds it, what it was told, which stages are finished.

The same command on the same folder resumes: a committed stage is never redone, a half-written
one is discarded and redone. Two runs never share a folder. A resumed run may have other actors and
less memory (`PLACEMENT`), so that one that was killed for want of memory can go on.
"""

import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from speechalign.artifacts import (
    MANIFEST,
    is_committed,
    verify_folder,
    write_json_atomically,
)
from speechalign.config.load import dump_yaml
from speechalign.errors import ConfigError, DataError
from speechalign.locks import held, make_writable

logger = logging.getLogger(__name__)

TIMINGS = "timings.json"
PLACEMENT = re.compile(
    r"pools\..+"
    r"|(evaluation\.|training\.heldout\.)?judges\.\d+\.(num_threads|pool\..+)"
    r"|(engine|rendering)\.num_threads"
    r"|engine\.(kv_cache_mib|max_num_seqs)"
    r"|training\.workers\.(cpus_per_worker|gpus_per_worker|max_failures|label_selector\..+)"
    r"|evaluation\.num_players"
)
"""Keys that say where and how fast, not what: a sample's seed is made of its prompt and index, and
its answer does not depend on those beside it. `num_workers` is not among them: a checkpoint of
online training is of so many."""
ITERATIONS = "pipeline.iterations"

Produce = Callable[[Path], object]
"""Commits the folder it is given (`artifacts.committed_folder`), as its last act."""


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """An open run: held by this process, told one config."""

    path: Path

    def stage(self, name: str, produce: Produce) -> Path:
        """Return the committed folder of a stage, producing it if it is not there yet.

        Raises:
            CorruptArtifact: the stage was finished, but its files have changed since.
        """
        folder = self.path / name
        if is_committed(folder):
            verify_folder(folder)
            logger.info("%s: finished earlier", name)
            return folder
        started_s = time.monotonic()
        logger.info("%s: started", name)
        folder.parent.mkdir(parents=True, exist_ok=True)
        produce(folder)
        if not is_committed(folder):
            raise DataError(f"stage {name} left no manifest in {folder}; this is a bug, report it")
        seconds = time.monotonic() - started_s
        timings = read_timings(self.path) | {name: round(seconds, 1)}
        write_json_atomically(self.path / TIMINGS, timings)
        logger.info("%s: finished in %.0f s", name, seconds)
        return folder


def read_timings(path: Path) -> dict[str, float]:
    """Return the wall-clock seconds of each finished stage of a run.

    A stage that was killed and made again has those of the last time.
    """
    timings = path / TIMINGS
    return json.loads(timings.read_text()) if timings.exists() else {}


@contextmanager
def open_run(path: Path, config: BaseModel) -> Iterator[RunDirectory]:
    """Hold a run directory for as long as the block lasts.

    Raises:
        ConfigError: the folder cannot be written, or holds a run that was started with another
            config.
        RunLocked: another live process holds it.
    """
    make_writable(path)
    with held(path, path / "lock"):
        _record_config(path / "config.yaml", config)
        yield RunDirectory(path=path)


def _record_config(path: Path, config: BaseModel) -> None:
    resolved, run = dump_yaml(config), path.parent
    # A config with which nothing was ever made may be mended.
    if path.exists() and any(run.rglob(MANIFEST)):
        earlier, now = yaml.safe_load(path.read_text()), yaml.safe_load(resolved)
        changed = changed_settings(earlier, now, is_finished=is_committed(run / "best"))
        if changed.refused:
            raise ConfigError(
                f"{run} was started with another config:\n"
                + "\n".join(f"  {line}" for line in changed.refused)
                + f"\nUse the old settings to resume (they are in {path}), or choose another "
                "run_dir."
            )
        for line in changed.allowed:
            logger.info("%s goes on with another setting: %s", run, line)
    partial = path.with_name(".config.yaml.partial")
    partial.write_text(resolved)
    partial.replace(path)


@dataclass(frozen=True, slots=True)
class ChangedSettings:
    """Lines about what differs between two configs."""

    allowed: tuple[str, ...]
    """The run goes on as if it had started so."""
    refused: tuple[str, ...]
    """What is there was made of other settings."""


def changed_settings(
    earlier: Mapping[str, Any], now: Mapping[str, Any], *, is_finished: bool
) -> ChangedSettings:
    """Return what differs between the config of a run and the one it shall resume with.

    Args:
        earlier: the plain values that the run was started with.
        now: those of the command.
        is_finished: whether the run has chosen its best policy, among all iterations.
    """
    before, after = _flat(earlier), _flat(now)
    free: list[str] = []
    bound: list[str] = []
    for key in sorted(before.keys() | after.keys()):
        was, is_now = before.get(key), after.get(key)
        if was == is_now:
            continue
        goes_on = key == ITERATIONS and not is_finished and after[key] > before.get(key, 0)
        # Fresh prompts were dealt out to so many iterations.
        goes_on = goes_on and before.get("pipeline.prompts") == "same"
        lines = free if goes_on or PLACEMENT.fullmatch(key) else bound
        lines.append(f"{key}: was {was!r}, now {is_now!r}")
    return ChangedSettings(allowed=tuple(free), refused=tuple(bound))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {prefix: value}
    return {
        key: leaf
        for name, child in items
        for key, leaf in _flat(child, f"{prefix}.{name}" if prefix else str(name)).items()
    }
