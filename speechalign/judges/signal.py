"""What the waveform alone tells, without a model."""

from collections.abc import Sequence

import numpy as np

from speechalign.config.judges import SignalConfig
from speechalign.judges.base import Judgement, is_audible
from speechalign.types import Clip, Unmeasured

FRAME_S = 0.02
SILENCE_DB = -40.0
"""Below the loudest frame."""


class Signal:
    """Durations and silences."""

    name = "signal"
    measures = ("duration_ratio", "silence_ratio")
    remarks = ()

    def __init__(self, config: SignalConfig) -> None:
        del config  # every judge is built from one

    def judge(self, clips: Sequence[Clip]) -> list[Judgement]:
        """Return both ratios; without a recording there is nothing to compare a duration with."""
        return [self._judge(clip) for clip in clips]

    def _judge(self, clip: Clip) -> Judgement:
        if clip.golden_duration_s <= 0:
            return Unmeasured("signal: nobody was recorded saying this text")
        duration_s = len(clip.waveform_N) / clip.sample_rate_hz
        return {
            "duration_ratio": duration_s / clip.golden_duration_s,
            "silence_ratio": silence_ratio(clip),
        }


def silence_ratio(clip: Clip) -> float:
    """Return the share of 20 ms frames 40 dB below the loudest one; 1 for a silent clip."""
    if not is_audible(clip):
        return 1.0
    frame = round(FRAME_S * clip.sample_rate_hz)
    whole = len(clip.waveform_N) // frame * frame
    power_T = (clip.waveform_N[:whole].reshape(-1, frame).astype(np.float64) ** 2).mean(1)
    return float((power_T < power_T.max() * 10 ** (SILENCE_DB / 10)).mean())
