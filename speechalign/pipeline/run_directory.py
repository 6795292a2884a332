"""A run on disk: who holds it, what it was told, which stages are finished.

The same command on the same folder resumes: a committed stage is never redone, a half-written
one is discarded and redone. Two runs never share a folder.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
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
from speechalign.config.load import config_hash, dump_yaml
from speechalign.errors import ConfigError, DataError
from speechalign.locks import held, make_writable

logger = logging.getLogger(__name__)

TIMINGS = "timings.json"

Produce = Callable[[Path], object]
"""Commits the folder it is given (`artifacts.committed_folder`), as its last act."""


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """An open run: held by this process, told one config."""

    path: Path
    config_hash: str

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
        ConfigError: the folder cannot be written, or holds a run with another config.
        RunLocked: another live process holds it.
    """
    make_writable(path)
    with held(path, path / "lock"):
        _record_config(path / "config.yaml", config)
        yield RunDirectory(path=path, config_hash=config_hash(config))


def _record_config(path: Path, config: BaseModel) -> None:
    resolved = dump_yaml(config)
    # A config with which nothing was ever made may be mended.
    if not path.exists() or not any(path.parent.rglob(MANIFEST)):
        partial = path.with_name(".config.yaml.partial")
        partial.write_text(resolved)
        partial.replace(path)
        return
    earlier = _flat(yaml.safe_load(path.read_text()))
    now = _flat(yaml.safe_load(resolved))
    changed = sorted(key for key in earlier.keys() | now.keys() if earlier.get(key) != now.get(key))
    if changed:
        lines = [f"  {key}: was {earlier.get(key)!r}, now {now.get(key)!r}" for key in changed]
        raise ConfigError(
            f"{path.parent} holds a run with another config:\n"
            + "\n".join(lines)
            + "\nresume with the config it has, or choose another run_dir"
        )


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
