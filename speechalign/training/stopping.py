"""SIGTERM (`ray job stop`, a node that is taken away): save, let go of everything, exit 143.

Outside of a training the process ends at once: what it was making is thrown away by its
context managers, finished stages stay. A training is asked instead, through a file that its
workers look for after every update: they save a checkpoint and return. If they take too long,
the process ends without waiting further, and the checkpoint before that one counts.
"""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from speechalign.errors import Stopped

logger = logging.getLogger(__name__)

STOPPED_CODE = 143
STOPPED_WORDS = "stopped; finished stages and the last checkpoint are kept"
"""In the last lines of a stopped command; `speechalign submit` looks for it."""
STOP_REQUEST = "stop-request"
"""A file in the folder of a training's state: its workers shall save and end."""
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
"""Seconds from SIGTERM to SIGKILL, set in the runtime environment of a job."""
RAYS_STOP_WAIT_S, USUAL_STOP_WAIT_S = 3.0, 30.0
"""Of a Ray job that does not say; of Kubernetes and other supervisors."""
SHARE_FOR_SAVING = 0.75
"""Of the wait; the rest is for leaving Ray and the run's folder."""


class _Asked:
    """Whether this process was asked to end, and the training that must be asked first."""

    is_stopping = False
    training: Path | None = None


def install_stop_handler() -> None:
    """Answer SIGTERM from now on.

    To be called again after `ray.init()`, which puts a handler of its own in place.
    """
    if _may_set_handlers():
        signal.signal(signal.SIGTERM, _on_sigterm)
        signal.signal(signal.SIGALRM, _on_deadline)


@contextmanager
def handlers_kept() -> Iterator[None]:
    """At the end of the block the handlers are those of before: a library leaves no trace."""
    numbers = (signal.SIGTERM, signal.SIGALRM)
    former = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        if _may_set_handlers():
            for number, handler in zip(numbers, former, strict=True):
                # None: not set from Python; what that was cannot be put back.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _may_set_handlers() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def saved_when_stopped(request: Path) -> Iterator[None]:
    """Inside the block SIGTERM creates the file `request`; the block ends when it was answered.

    Raises:
        Stopped: at the end of the block, if the process was asked to end meanwhile.
    """
    request.parent.mkdir(parents=True, exist_ok=True)
    request.unlink(missing_ok=True)
    _Asked.training = request
    try:
        yield
    except Exception as error:  # whatever it is, a process that was asked to end shall end
        if not request.exists():
            raise
        logger.warning("the training failed while it was stopped: %s", error)
    finally:
        _Asked.training = None
        signal.setitimer(signal.ITIMER_REAL, 0)
    if request.exists():
        request.unlink()
        raise Stopped


def seconds_to_save() -> float:
    """Return how long workers may take after SIGTERM."""
    usual = RAYS_STOP_WAIT_S if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else USUAL_STOP_WAIT_S
    return SHARE_FOR_SAVING * float(os.environ.get(STOP_WAIT, usual))


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    del number, frame
    if _Asked.is_stopping:  # on its way out, or saving; SIGKILL is for the impatient
        return
    _Asked.is_stopping = True
    if _Asked.training is None:
        raise Stopped
    seconds = seconds_to_save()
    logger.warning("asked to stop: the training saves, for %.0f s at most", seconds)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    _Asked.training.touch()


def _on_deadline(number: int, frame: FrameType | None) -> None:
    del number, frame
    logger.warning("the training did not save in time; its checkpoint before counts")
    raise Stopped
