"""Which models listen, and how the rewards are made of what they say."""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, assert_never

from pydantic import Field, FiniteFloat, model_validator

from speechalign.config.base import Config
from speechalign.config.sampling import PoolConfig


class JudgeBase(Config):
    """What every judge can be told."""

    num_threads: int = Field(default=1, gt=0)
    pool: PoolConfig = PoolConfig(num_cpus=0.25, batch_size=32)


class RecogniserConfig(JudgeBase):
    """Speech recognition: what was said, against what should have been.

    Measures: `<role>_text_logprob`, the mean log-probability of the text's tokens, given the
    sound (it tells two samples apart where the transcripts do not), and, if it transcribes,
    `<role>_wer`, `<role>_cer`, `<role>_word_errors` and `<role>_words`.
    """

    kind: Literal["recogniser"] = "recogniser"
    model: Literal["tiny.en", "base"] = "tiny.en"
    role: Literal["reward", "eval"] = "reward"
    """The evaluation's recogniser must be another than the reward's."""
    transcribe: bool = True
    """False costs less than half: no transcript, no error rates."""
    beam_size: int = Field(default=1, gt=0)
    batch_size: int = Field(default=12, gt=0)


class SpeakerConfig(JudgeBase):
    """Cosine between the voice of a clip and that of its speaker prompt: `speaker_similarity`."""

    kind: Literal["speaker"] = "speaker"


class DistillMosConfig(JudgeBase):
    """Predicted mean opinion score, DistillMOS: `distillmos`, about 1 to 5."""

    kind: Literal["distillmos"] = "distillmos"
    dtype: Literal["fp32", "bf16"] = "fp32"
    """bf16 takes half the time on CPUs that compute in it, and moved no score by .02; on others it
    is fp32."""


class DnsMosConfig(JudgeBase):
    """Predicted mean opinion score, DNSMOS overall: `dnsmos`, about 1 to 5."""

    kind: Literal["dnsmos"] = "dnsmos"


class SignalConfig(JudgeBase):
    """What the waveform alone tells: `duration_ratio`, `silence_ratio`."""

    kind: Literal["signal"] = "signal"


class RewardModelJudgeConfig(JudgeBase):
    """A learned reward: `reward_model`. It reads the tokens and needs no sound."""

    kind: Literal["reward_model"] = "reward_model"
    path: Path
    """A folder of `speechalign reward-model`."""


MEASURE_PATTERN = r"^[a-z][a-z0-9_]*$"


class PythonJudgeConfig(JudgeBase):
    """A user's own reward, in Python: `<name>` (see speechalign.judges.user_code)."""

    kind: Literal["python"] = "python"
    name: str = Field(pattern=MEASURE_PATTERN)
    target: str = Field(pattern=r"^[\w.]+:\w+$")
    """`package.module:Class`; each actor creates one with `arguments`."""
    arguments: dict[str, Any] = Field(default_factory=dict[str, Any])
    reads: Literal["sound", "tokens"] = "sound"
    """What it is given: types.Clip, or types.TokenAnswer without anything being rendered."""
    timeout_s: float = Field(default=600.0, gt=0)
    """For a batch. After it the batch is not judged, nor are later ones until the call returns."""


class HttpJudgeConfig(JudgeBase):
    """A reward behind an address: `<name>` (see speechalign.judges.http)."""

    kind: Literal["http"] = "http"
    name: str = Field(pattern=MEASURE_PATTERN)
    url: str = Field(pattern=r"^https?://")
    batch_size: int = Field(default=8, gt=0)
    """Samples a request."""
    timeout_s: float = Field(default=30.0, gt=0)
    """To connect, and for the whole answer."""
    max_retries: int = Field(default=3, ge=0)
    """Of a request that was not answered, or with 429 or 5xx."""
    backoff_s: float = Field(default=1.0, ge=0)
    """Before the first retry; it doubles each time."""
    token_env: str | None = None
    """The environment variable with the bearer token; its value is in no file of the run."""


ListenerConfig: TypeAlias = (
    RecogniserConfig
    | SpeakerConfig
    | DistillMosConfig
    | DnsMosConfig
    | SignalConfig
    | PythonJudgeConfig
    | HttpJudgeConfig
)
"""Judges that listen, or can."""
JudgeConfig: TypeAlias = Annotated[
    ListenerConfig | RewardModelJudgeConfig, Field(discriminator="kind")
]


TRUNCATED = "truncated"
"""A measure that no judge is needed for."""


def listens(config: JudgeConfig) -> bool:
    """Whether a judge needs the sound; others read the tokens."""
    if isinstance(config, PythonJudgeConfig):
        return config.reads == "sound"
    return not isinstance(config, RewardModelJudgeConfig)


def judge_name(config: JudgeConfig) -> str:
    """Return the name of the judge without loading its model."""
    if isinstance(config, PythonJudgeConfig | HttpJudgeConfig):
        return config.name
    return f"{config.role}_recogniser" if isinstance(config, RecogniserConfig) else config.kind


def judge_measures(config: JudgeConfig) -> tuple[str, ...]:
    """Return the columns that a judge writes, without loading its model."""
    match config:
        case RecogniserConfig():
            suffixes = ("text_logprob",)
            if config.transcribe:
                suffixes += ("wer", "cer", "word_errors", "words")
            return tuple(f"{config.role}_{suffix}" for suffix in suffixes)
        case SpeakerConfig():
            return ("speaker_similarity",)
        case SignalConfig():
            return ("duration_ratio", "silence_ratio")
        case PythonJudgeConfig() | HttpJudgeConfig():
            return (config.name,)
        case DistillMosConfig() | DnsMosConfig() | RewardModelJudgeConfig():
            return (config.kind,)
        case _:
            assert_never(config)


class RewardTermConfig(Config):
    """One measure's part of the reward."""

    measure: str
    """A column that some judge writes, e.g. `reward_wer`."""
    weight: FiniteFloat
    """Negative for a measure of which less is better."""
    target: FiniteFloat | None = None
    """The term is then the distance to it: `duration_ratio` 1 with a negative weight."""
    lowest: FiniteFloat | None = None
    """Smaller values (distances, where there is a target) count as this."""
    highest: FiniteFloat | None = None
    """Larger values count as this: a word error rate above 1 is no worse than 1."""
    when_silent: FiniteFloat | None = None
    """What the measure of an answer without a sound is taken for, where its judge needs a voice to
    measure (speaker, naturalness). Without it such an answer has no reward, and the worst that a
    policy can say is never learned from."""

    @model_validator(mode="after")
    def _values_can_differ(self) -> "RewardTermConfig":
        if self.lowest is not None and self.highest is not None and self.lowest >= self.highest:
            raise ValueError(
                f"lowest {self.lowest:g} is not below highest {self.highest:g}: every value of "
                f"{self.measure} would count the same"
            )
        return self


class RewardConfig(Config):
    """A weighted sum of measures; `truncated` (1 or 0) is measured of every sample."""

    terms: tuple[RewardTermConfig, ...] = ()
    """None: nobody asks what a sample is worth, as with golden pairs."""
    normalise: Literal["none", "group"] = "none"
    """group: each term less its mean over the samples of the prompt, by its deviation there."""
    failure_budget: float = Field(default=0.05, ge=0, le=1)
    """The share of samples that may have no reward before the run stops."""
