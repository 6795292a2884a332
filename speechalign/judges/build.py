"""From what a run was told to what listens."""

from typing import assert_never

from speechalign.config.judges import (
    DistillMosConfig,
    DnsMosConfig,
    HttpJudgeConfig,
    ListenerConfig,
    PythonJudgeConfig,
    RecogniserConfig,
    SignalConfig,
    SpeakerConfig,
)
from speechalign.judges.base import Judge


def build_judge(config: ListenerConfig) -> Judge:  # noqa: PLR0911 - one a judge
    """Return the judge that a config names; its model is loaded here, in the actor.

    Raises:
        ConfigError: the package that carries the model is not installed.
    """
    match config:
        case RecogniserConfig():
            from speechalign.judges.whisper import Whisper

            return Whisper(config)
        case SpeakerConfig():
            from speechalign.judges.speaker import SpeakerSimilarity

            return SpeakerSimilarity(config)
        case DistillMosConfig():
            from speechalign.judges.naturalness import DistillMos

            return DistillMos(config)
        case DnsMosConfig():
            from speechalign.judges.naturalness import DnsMos

            return DnsMos(config)
        case SignalConfig():
            from speechalign.judges.signal import Signal

            return Signal(config)
        case PythonJudgeConfig():
            from speechalign.judges.user_code import UserJudge

            return UserJudge(config)
        case HttpJudgeConfig():
            from speechalign.judges.http import HttpJudge

            return HttpJudge(config)
        case _:
            assert_never(config)
