"""Sound while the answer is still being made, without clicks where its parts meet.

A sentence is rendered again from its start in each window, and only what is new is heard. Three
things make the joins inaudible: the NAR model's codes of a frame are settled once and for all,
when enough frames beyond it are known (`settling_of`: fewer at first, so that the first sound is
not waited for); a frame is heard when `lookahead_frames` settled ones
are beyond it, as far as the codec's decoder looks; two windows are mixed where they meet.

Everything a window needs is in its arguments, so any renderer can go on with any stream.

Shapes: K codebooks, k levels of the AR model, T frames, N samples, X samples of a crossfade.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from speechalign.codec.base import Codec
from speechalign.config.serving import StreamingConfig
from speechalign.policy.nar import LevelFiller


def _no_codes() -> NDArray[np.int64]:
    return np.zeros((0, 0), np.int64)


def _no_sound() -> NDArray[np.float32]:
    return np.zeros(0, np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """What of a sentence has left the server."""

    num_frames: int = 0
    """Frames that were heard."""
    codes_KT: NDArray[np.int64] = field(default_factory=_no_codes)
    """All rendered levels of the frames that are settled; they go beyond those that were heard."""
    tail_X: NDArray[np.float32] = field(default_factory=_no_sound)
    """What the last window said would follow: the next one fades in over it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The answer so far, and how much of it was heard."""

    codes_kT: NDArray[np.int64]
    speaker_codes_KT: NDArray[np.int16]
    heard: Heard
    is_last: bool


class WindowRenderer:
    """Renders what is new of a growing answer."""

    def __init__(
        self, codec: Codec, filler: LevelFiller, num_levels: int, config: StreamingConfig
    ) -> None:
        self._codec = codec
        self._filler = filler
        self._num_levels = num_levels
        self._config = config
        self._num_fade = round(config.crossfade_ms / 1000 * codec.sample_rate_hz)
        self._samples_per_frame = round(codec.sample_rate_hz / codec.frame_rate_hz)

    def render(self, window: Window) -> tuple[NDArray[np.float32], Heard]:
        """Return the samples that can be heard now, and what was heard then.

        The sum of all windows is as long as the whole answer rendered at once.
        """
        config, num_known, heard = self._config, window.codes_kT.shape[1], window.heard
        num_settled = num_known if window.is_last else num_known - config.settling_of(num_known)
        end = num_known if window.is_last else num_settled - config.lookahead_frames
        if end <= heard.num_frames:
            return _no_sound(), heard
        codes_KT = self._levels(window)[:, :num_settled]
        if heard.codes_KT.size:
            codes_KT[:, : heard.codes_KT.shape[1]] = heard.codes_KT
        wave_N = self._codec.decode(codes_KT)
        first, last = heard.num_frames * self._samples_per_frame, end * self._samples_per_frame
        new_N = _faded_in(wave_N[first:last], heard.tail_X)
        tail_X = wave_N[last : last + self._num_fade].copy()
        return new_N, Heard(num_frames=end, codes_KT=codes_KT, tail_X=tail_X)

    def _levels(self, window: Window) -> NDArray[np.int64]:
        if len(window.codes_kT) >= self._num_levels:
            return window.codes_kT[: self._num_levels].copy()
        (codes_KT,) = self._filler.fill(
            [window.codes_kT[0]], [window.speaker_codes_KT], self._num_levels
        )
        return codes_KT.copy()


def _faded_in(new_N: NDArray[np.float32], tail_X: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mix the start of a window with what the window before it said would follow."""
    count = min(len(tail_X), len(new_N))
    mixed_N = new_N.copy()
    weight_X = np.linspace(0, 1, count + 2, dtype=np.float32)[1:-1]
    mixed_N[:count] = weight_X * new_N[:count] + (1 - weight_X) * tail_X[:count]
    return mixed_N


class Schedule:
    """Counts frames and says when enough of them are there for a window."""

    def __init__(self, config: StreamingConfig) -> None:
        self._config = config
        self._size = float(config.first_window_frames)
        self._due = config.first_window_frames

    def is_due(self, num_frames: int) -> bool:
        """Whether a window should be rendered now that so many frames are known."""
        if num_frames < self._due:
            return False
        growth = self._config.window_growth
        step = min(self._size * (growth - 1), self._config.max_window_frames)
        self._size += max(step, 1.0)
        self._due = max(num_frames + 1, round(self._size))
        return True
