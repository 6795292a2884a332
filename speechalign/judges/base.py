"""What a judge is: a model that listens to clips and measures them."""

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias

from speechalign.types import Clip, Unmeasured

Judgement: TypeAlias = Mapping[str, float | str] | Unmeasured
"""One number per measure and one text per remark, or why there is none."""

SHORTEST_CLIP_S = 0.1
"""Nothing shorter can be speech."""
SILENT = "nothing is heard"
"""In the reason for a missing measure: the policy said nothing, and the judge needs a voice."""


class Judge(Protocol):
    """Measures clips; in order, one judgement each."""

    @property
    def name(self) -> str:
        """What the judge is called."""
        ...

    @property
    def measures(self) -> tuple[str, ...]:
        """The numbers of the judgements, in their order; a column each."""
        ...

    @property
    def remarks(self) -> tuple[str, ...]:
        """The texts of the judgements, for people to read; a column each."""
        ...

    def judge(self, clips: Sequence[Clip]) -> list[Judgement]:
        """Return one judgement a clip; a clip that cannot be judged is Unmeasured."""
        ...


def is_audible(clip: Clip) -> bool:
    """Whether there is anything to listen to."""
    long_enough = len(clip.waveform_N) >= SHORTEST_CLIP_S * clip.sample_rate_hz
    return long_enough and bool(abs(clip.waveform_N).max() > 1e-4)
