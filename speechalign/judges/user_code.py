"""A reward that a user wrote.

    class MyReward:
        def __init__(self, **arguments): ...          # once an actor
        def __call__(self, samples): ...              # -> a number or None for each

`samples` are types.Clip where it reads sound, types.TokenAnswer where it reads tokens. None, a
value that is no finite number and an exception are failed judgements: the sample has no reward,
with the reason; they count towards `reward.failure_budget`. After an exception of a batch each
sample is asked about alone, so that one bad sample does not take the others with it.

A batch that takes longer than `timeout_s` is missing too. Python cannot end the call: it goes on,
and whatever comes before it returns is missing at once, so a call that never returns ends the run
by its failure budget. (One that never lets go of the interpreter's lock cannot be left behind.)
The object is made and called in one thread, which is not the main one.
"""

import importlib
import inspect
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import Any, TypeVar

from speechalign.config.judges import PythonJudgeConfig
from speechalign.errors import ConfigError, DataError
from speechalign.judges.base import Judgement
from speechalign.types import Clip, Measured, Score, Unmeasured

SampleT = TypeVar("SampleT")
ResultT = TypeVar("ResultT")
LONGEST_VALUE = 80
"""Characters of a wrong value that a reason quotes."""


def load_user_class(config: PythonJudgeConfig) -> Callable[..., Any]:
    """Return the class that a config names, checked as far as it can be without an object of it.

    Raises:
        ConfigError: it cannot be imported, is no class of callables, or takes other arguments.
    """
    judge = f"judge {config.name!r}: {config.target}"
    module_name, _, name = config.target.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # noqa: BLE001 - an import runs the user's code
        raise ConfigError(
            f"{judge} cannot be imported ({type(error).__name__}: {error}); it must be "
            "module:Class, on the Python path of the driver and of all actors"
        ) from None
    if not isinstance(found, type):
        raise ConfigError(f"{judge} is no class; a function must become the __call__ of one")
    if not any("__call__" in vars(base) for base in found.__mro__):
        raise ConfigError(f"{judge} has no __call__; it must take samples and return numbers")
    try:
        inspect.signature(found).bind(**config.arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{judge} does not take these arguments: {error}") from None
    return found


class _OwnThread:
    """Where the user's code runs, one call after another, so that it can be left behind."""

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        # No pool of `concurrent.futures`: at its end the process would wait for a call that hangs.
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def begin(self, call: Callable[[], ResultT]) -> "Future[ResultT]":
        """Return what will hold the result or the error."""
        future: Future[ResultT] = Future()

        def run() -> None:
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001 - the user's code may raise anything
                future.set_exception(error)

        self._calls.put(run)
        return future

    def _run(self) -> None:
        while True:
            self._calls.get()()


class UserReward:
    """The user's object, and what becomes of its answers.

    Raises:
        ConfigError: the object cannot be made.
    """

    def __init__(self, config: PythonJudgeConfig) -> None:
        self._config = config
        create = load_user_class(config)
        self._thread = _OwnThread(f"judge {config.name}")
        self._asked: Future[list[Score]] | None = None
        try:
            self._reward = self._thread.begin(lambda: create(**config.arguments)).result()
        except Exception as error:  # the user's code may raise anything
            raise ConfigError(
                f"judge {config.name!r}: {config.target} cannot be created: "
                f"{type(error).__name__}: {error}"
            ) from error

    def scores(self, samples: Sequence[SampleT]) -> list[Score]:
        """Return one score a sample.

        Raises:
            DataError: the user's object does not return one value for each.
        """
        name, timeout_s = self._config.name, self._config.timeout_s
        if self._asked is not None and not self._asked.done():
            return [Unmeasured(f"{name}: it has not returned from an earlier batch")] * len(samples)
        self._asked = self._thread.begin(lambda: self._scores(samples))
        if not wait([self._asked], timeout_s).done:
            return [Unmeasured(f"{name}: no answer within {timeout_s:g} s")] * len(samples)
        return self._asked.result()

    def _scores(self, samples: Sequence[SampleT]) -> list[Score]:
        try:
            returned = self._reward(samples)
            values = list(returned) if isinstance(returned, Iterable) else None
        except Exception as error:  # noqa: BLE001 - the user's code may raise anything
            if len(samples) > 1:
                return [score for sample in samples for score in self._scores([sample])]
            return [Unmeasured(f"{self._config.name}: {type(error).__name__}: {error}")]
        if values is None or len(values) != len(samples):
            found = repr(returned) if values is None else f"{len(values)} values"
            raise DataError(
                f"judge {self._config.name!r} returned {found} for {len(samples)} "
                "samples; it must return a number or None for each"
            )
        return [self._score(value) for value in values]

    def _score(self, value: Any) -> Score:
        if value is None:
            return Unmeasured(f"{self._config.name}: the reward returned nothing")
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # the last is torch's
            return Unmeasured(f"{self._config.name}: {repr(value)[:LONGEST_VALUE]} is no number")
        if not math.isfinite(number):
            return Unmeasured(f"{self._config.name}: {number} is no number")
        return Measured(number)


class UserJudge:
    """A judge that listens."""

    remarks: tuple[str, ...] = ()

    def __init__(self, config: PythonJudgeConfig) -> None:
        self.name = config.name
        self.measures = (config.name,)
        self._reward = UserReward(config)

    def judge(self, clips: Sequence[Clip]) -> list[Judgement]:
        """Return one judgement a clip."""
        return [judgement_of(self.name, score) for score in self._reward.scores(clips)]


def judgement_of(name: str, score: Score) -> Judgement:
    """Return a score as a judgement of one measure."""
    return {name: score.value} if isinstance(score, Measured) else score
