"""Artifacts that are either whole or absent.

A folder is committed by writing everything into a sibling, hashing it into `manifest.json`,
and renaming: a reader sees the finished folder or none. safetensors accepts flipped bits, so
the hash, not the format, is what says that a file is the one that was written.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from speechalign.errors import ConfigError, CorruptArtifact, DataError

MANIFEST = "manifest.json"


def sha256_of(path: Path) -> str:
    """Return the hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def committed_folder(target: Path, facts: Mapping[str, Any]) -> Iterator[Path]:
    """Yield a folder to write into; on success it becomes `target` in one rename.

    Args:
        target: where the artifact shall appear; a former one is replaced.
        facts: what to record beside the hashes (counts, fingerprints, versions). The mapping is
            read on exit, so the body may still add to it.

    Raises:
        ConfigError: something that is no artifact stands at `target`.
    """
    partial = partial_folder(target)
    yield partial
    commit_folder(partial, target, facts)


def refuse_foreign(target: Path) -> None:
    """Keep what is not ours: committing an artifact removes what stood in its place.

    Raises:
        ConfigError: something that is no artifact stands at `target`.
    """
    is_empty = target.is_dir() and not any(target.iterdir())
    if target.exists() and not is_empty and not is_committed(target):
        raise ConfigError(
            f"{target} exists and has no {MANIFEST}: it is no artifact, and would be replaced; "
            "name another folder, or remove it"
        )


def partial_folder(target: Path) -> Path:
    """Return a new, empty sibling of `target` to write into.

    Raises:
        ConfigError: something that is no artifact stands at `target`.
    """
    refuse_foreign(target)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def commit_folder(partial: Path, target: Path, facts: Mapping[str, Any]) -> None:
    """Hash what was written and rename it to `target`; a former artifact is replaced."""
    files = {
        str(path.relative_to(partial)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(partial.rglob("*"))
        if path.is_file()
    }
    write_json_atomically(partial / MANIFEST, {"facts": dict(facts), "files": files})
    former = _former(target)
    shutil.rmtree(former, ignore_errors=True)
    if target.exists():
        target.replace(former)
    partial.replace(target)
    shutil.rmtree(former, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Put back an artifact that was about to be replaced when its process was killed."""
    if not target.exists() and is_committed(_former(target)):
        _former(target).replace(target)


def _former(target: Path) -> Path:
    return target.with_name(f".{target.name}.former")


def is_committed(folder: Path) -> bool:
    """Whether the artifact was finished (its files are not hashed again)."""
    return (folder / MANIFEST).is_file()


def manifest_facts(folder: Path) -> dict[str, Any]:
    """Return the recorded facts of a committed folder."""
    return _manifest(folder)["facts"]


def verify_folder(folder: Path) -> dict[str, Any]:
    """Hash every file against the manifest and return the recorded facts.

    Raises:
        CorruptArtifact: a file is missing, or differs in size or content.
        DataError: there is no manifest, so nothing was ever committed here.
    """
    manifest = _manifest(folder)
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise CorruptArtifact(f"{path} is missing; remove {folder} and run again")
        if path.stat().st_size != entry["bytes"] or sha256_of(path) != entry["sha256"]:
            raise CorruptArtifact(
                f"{path} differs from its manifest (torn write or edited file); "
                f"remove {folder} and run again"
            )
    return manifest["facts"]


def write_json_atomically(path: Path, value: Any) -> None:
    """Write JSON so that a reader never sees half of it."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        json.dump(value, file, indent=2, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{folder} has no {MANIFEST}: it was never finished; produce it first")
    return json.loads(path.read_text())
