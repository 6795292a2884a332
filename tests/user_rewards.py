"""Rewards as a user would write them; named by import path in tests."""

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


class Odd:
    """Values that are no rewards."""

    def __call__(self, samples: Sequence[TokenAnswer]) -> list[float | None]:
        return [None, float("nan"), float("inf"), 2.0][: len(samples)]


class TooFew:
    """Forgets one."""

    def __call__(self, samples: Sequence[TokenAnswer]) -> list[float]:
        return [1.0] * (len(samples) - 1)


not_callable = 3
