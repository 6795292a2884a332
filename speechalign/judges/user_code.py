"""A reward that a user wrote.

    class MyReward:
        def __init__(self, **arguments): ...          # once an actor
        def __call__(self, samples): ...              # -> a number or None for each

`samples` are types.Clip where it reads sound, types.TokenAnswer where it reads tokens. None, a
number that is not finite and an exception are failed judgements: the sample has no reward, with
the reason; they count towards `reward.failure_budget`. After an exception of a batch each sample
is asked about alone, so that one bad sample does not take the others with it.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from speechalign.config.judges import PythonJudgeConfig
from speechalign.errors import ConfigError, DataError
from speechalign.judges.base import Judgement
from speechalign.types import Clip, Measured, Score, Unmeasured

SampleT = TypeVar("SampleT")


def load_user_class(config: PythonJudgeConfig) -> Callable[..., Any]:
    """Return the class that a config names.

    Raises:
        ConfigError: it cannot be imported, or cannot be called.
    """
    module_name, _, name = config.target.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"judge {config.name!r}: {config.target} cannot be imported ({error}); it must be "
            "module:Class, on the Python path of the driver and of all actors"
        ) from None
    if not callable(found):
        raise ConfigError(f"judge {config.name!r}: {config.target} is no class or function")
    return found


class UserReward:
    """The user's object, and what becomes of its answers."""

    def __init__(self, config: PythonJudgeConfig) -> None:
        self._config = config
        self._reward = load_user_class(config)(**config.arguments)

    def scores(self, samples: Sequence[SampleT]) -> list[Score]:
        """Return one score a sample.

        Raises:
            DataError: the user's object returns another number of values.
        """
        try:
            values = list(self._reward(samples))
        except Exception as error:  # noqa: BLE001 - the user's code may raise anything
            if len(samples) > 1:
                return [score for sample in samples for score in self.scores([sample])]
            return [Unmeasured(f"{self._config.name}: {type(error).__name__}: {error}")]
        if len(values) != len(samples):
            raise DataError(
                f"judge {self._config.name!r} returned {len(values)} values for {len(samples)} "
                "samples; it must return a number or None for each"
            )
        return [self._score(value) for value in values]

    def _score(self, value: Any) -> Score:
        if value is None:
            return Unmeasured(f"{self._config.name}: it returned nothing")
        number = float(value)
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
