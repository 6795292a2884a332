"""Rewards as a user would write them; named by import path in tests."""

import threading
import zlib
from collections.abc import Sequence

from speechalign.types import Clip, TokenAnswer


class ShareOfLowTokens:
    """Reads tokens; every tenth sample of a prompt number cannot be judged."""

    def __init__(self, limit: int = 16, *, fails: bool = False) -> None:
        self._limit, self._fails = limit, fails

    def __call__(self, samples: Sequence[TokenAnswer]) -> list[float | None]:
        return [self._score(sample) for sample in samples]

    def _score(self, sample: TokenAnswer) -> float | None:
        if self._fails and sum(sample.token_ids) % 10 == 0:
            return None
        return sum(t < self._limit for t in sample.token_ids) / max(1, len(sample.token_ids))


class Duration:
    """Reads sound."""

    def __call__(self, samples: Sequence[Clip]) -> list[float]:
        return [len(clip.waveform_N) / clip.sample_rate_hz for clip in samples]


class Fragile:
    """Raises for a batch with a bad sample in it."""

    def __call__(self, samples: Sequence[TokenAnswer]) -> list[float]:
        if any(sample.text == "bad" for sample in samples):
            raise RuntimeError("I cannot read this")
        return [1.0] * len(samples)


class Hangs:
    """Does not answer before it is released."""

    released = threading.Event()

    def __call__(self, samples: Sequence[TokenAnswer]) -> list[float]:
        self.released.wait()
        return [1.0] * len(samples)


class OfOneThread:
    """Cannot be used in another thread than it was made in, as a connection of sqlite3."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def __call__(self, samples: Sequence[TokenAnswer]) -> list[float]:
        if threading.get_ident() != self._thread:
            raise RuntimeError("of another thread")
        return [1.0] * len(samples)


class Odd:
    """Values that are no rewards."""

    def __call__(self, samples: Sequence[TokenAnswer]) -> list[float | None]:
        return [None, float("nan"), float("inf"), 2.0][: len(samples)]


class TooFew:
    """Forgets one."""

    def __call__(self, samples: Sequence[TokenAnswer]) -> list[float]:
        return [1.0] * (len(samples) - 1)


class Wordy:
    """Values of other types."""

    def __call__(self, samples: Sequence[TokenAnswer]) -> Sequence[object]:
        return ["high", [1.0], 10**400, True][: len(samples)]


class Forgetful:
    """Has no return."""

    def __call__(self, samples: Sequence[TokenAnswer]) -> None:
        pass


class NotCallable:
    """Has no __call__."""


class Broken:
    """Cannot be created."""

    def __init__(self) -> None:
        raise OSError("no model here")

    def __call__(self, samples: Sequence[TokenAnswer]) -> list[float]:
        return [1.0] * len(samples)


def is_one_of_ten(sample_id: str) -> bool:
    """Whether a sample is of the tenth that `FailsForATenth` cannot judge."""
    return zlib.crc32(sample_id.encode()) % 10 == 0


class FailsForATenth:
    """Reads sound; raises where one of ten samples is in the batch."""

    def __call__(self, samples: Sequence[Clip]) -> list[float]:
        for clip in samples:
            if is_one_of_ten(clip.sample_id):
                raise RuntimeError(f"I cannot hear {clip.sample_id}")
        return [len(clip.waveform_N) / clip.sample_rate_hz for clip in samples]


def a_function(samples: Sequence[TokenAnswer]) -> list[float]:
    return [1.0] * len(samples)


not_callable = 3
