"""Who may write a folder: one process at a time, on all hosts that share the file system.

A lock is a file that names its owner. It is alive while its process is, as far as this host can
see, or else while its heartbeat is fresh; the lock of a dead process is taken over.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from speechalign.artifacts import write_json_atomically
from speechalign.errors import ConfigError, RunLocked

logger = logging.getLogger(__name__)

HEARTBEAT_S = 10.0
STALE_AFTER_S = 60.0
"""A lock of another host without a heartbeat for this long belongs to a dead process."""
NOT_SUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def held(folder: Path, lock: Path) -> Iterator[None]:
    """Be the only one who writes a folder for as long as the block lasts.

    Args:
        folder: what is written; it need not exist.
        lock: the file that says so; its parent exists.

    Raises:
        RunLocked: another live process holds it.
    """
    owner = {
        "host": socket.gethostname(),
        "processes": _processes(),
        "pid": os.getpid(),
        "started": _start_of(os.getpid()),
        "job_id": os.environ.get("RAY_JOB_ID", ""),
    }
    _acquire(folder, lock, owner)
    released = threading.Event()

    def beat() -> None:
        while not released.wait(HEARTBEAT_S):
            try:
                if _owner_of(lock) == owner:
                    lock.touch()
                else:  # this host slept, or could not write, for so long that it looked dead
                    logger.error("%s: another run has taken over; stop this one", folder)
            except OSError as error:
                logger.warning("%s: no heartbeat: %s", lock, error)

    thread = threading.Thread(target=beat, name="lock-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        released.set()
        thread.join()
        if _owner_of(lock) == owner:
            lock.unlink()


@contextmanager
def held_output(output: Path) -> Iterator[None]:
    """Be the only one who makes an artifact; its lock lies beside it.

    Raises:
        ConfigError: the folder that it goes to cannot be written.
        RunLocked: another live process makes it.
    """
    make_writable(output.parent)
    with held(output, output.with_name(f".{output.name}.lock")):
        yield


def make_writable(folder: Path) -> None:
    """Make a folder if it is not there, and try to write a file into it.

    Raises:
        ConfigError: that is not possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written ({error.strerror}); write to another folder"
        ) from None


def _owner_of(lock: Path) -> Any:
    try:
        return json.loads(lock.read_text())
    except (ValueError, FileNotFoundError):
        return None


def _acquire(folder: Path, lock: Path, owner: dict[str, Any]) -> None:
    while True:
        with lock.open("a+") as file:
            _wait_for_others(file)
            if not _is_file_of(lock, file):
                continue  # its owner ended, or somebody took it, while we waited
            file.seek(0)
            former = file.read()
            if former:
                _refuse_if_alive(folder, former, os.fstat(file.fileno()).st_mtime)
                logger.warning("%s: taking over from a run that died", folder)
            write_json_atomically(lock, owner)
            return


def _wait_for_others(file: TextIO) -> None:
    """Have the operating system let one process at a time look at a lock and take it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:  # then two could take a dead lock at one moment
            raise


def _is_file_of(lock: Path, file: TextIO) -> bool:
    try:
        return lock.stat().st_ino == os.fstat(file.fileno()).st_ino
    except FileNotFoundError:
        return False


def _refuse_if_alive(folder: Path, former: str, last_sign: float) -> None:
    age_s = time.time() - last_sign
    try:
        owner = json.loads(former)
    except ValueError:  # of a host that died while it wrote
        return
    if owner.get("processes") == _processes():
        # A container that starts again has the same numbers, so a pid alone says little.
        is_alive = _is_running(owner["pid"]) and _start_of(owner["pid"]) == owner.get("started")
    else:
        is_alive = age_s < STALE_AFTER_S
    if is_alive:
        raise RunLocked(
            f"{folder} is held by process {owner['pid']} on {owner['host']} (last sign of life "
            f"{age_s:.0f} s ago); wait for it, stop it, or use another folder"
        )


def _processes() -> str:
    """Name the set of processes that a pid is one of.

    A host's name does not: it stays after a reboot, and containers may share it.
    """
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot_id}/{Path('/proc/self/ns/pid').stat().st_ino}"


def _start_of(pid: int) -> str:
    """Return when a process started, in ticks since boot; nothing if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]  # field 22; the name before may hold anything


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
