"""What a speech endpoint can be told: the `args` of its application in a file of Ray Serve."""

import ipaddress
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from speechalign.config.base import Config
from speechalign.config.codec import CodecConfig, EmbeddedCodecConfig
from speechalign.config.sampling import GenerationEngineConfig, RenderingConfig, VllmConfig

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Name: TypeAlias = Annotated[str, Field(pattern=NAME_PATTERN)]
"""Of a model or a voice: what may stand in a URL and in a file name."""
AudioFormat: TypeAlias = Literal["mp3", "opus", "aac", "flac", "wav", "pcm"]

APPLICATION, IMPORT_PATH = "speechalign", "speechalign.serving.app:build"
"""What a file of Ray Serve calls the endpoint, and where Serve finds it."""
INGRESS, RENDERER = "ingress", "renderer"
"""Deployments of the application; each policy has one more, `speaker_name`."""


def speaker_name(policy: str) -> str:
    """Return the name of a policy's deployment."""
    return f"speaker-{policy}"


class ReplicasConfig(Config):
    """How many processes a deployment has, and what each is given."""

    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=1, ge=1)
    target_ongoing_requests: float = Field(default=8.0, gt=0)
    """A replica; above it Serve adds one."""
    max_ongoing_requests: int = Field(default=32, gt=0)
    """A replica; the others wait for it."""
    upscale_delay_s: float = Field(default=10.0, ge=0)
    downscale_delay_s: float = Field(default=300.0, ge=0)
    num_cpus: float = Field(default=0.25, ge=0)
    num_gpus: float = Field(default=0.0, ge=0)
    label_selector: dict[str, str] = Field(default_factory=dict[str, str])
    """Labels of the nodes that a replica may live on."""

    @model_validator(mode="after")
    def _least_is_not_above_most(self) -> "ReplicasConfig":
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas {self.min_replicas} exceeds max_replicas {self.max_replicas}"
            )
        return self


class ServedPolicyConfig(Config):
    """A policy that people can ask for by name."""

    path: Path
    """The folder of an AR policy. Changed in a running application, it is swapped in place."""
    reward_model: Path | None = None
    """Chooses among `n_best` answers."""


class SpeakingConfig(Config):
    """How a policy speaks."""

    temperature: float = Field(default=0.7, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    max_new_tokens: int = Field(default=400, gt=0)
    """Of one sentence; an answer that reaches it is cut and counted."""
    max_sentence_characters: int = Field(default=120, ge=20, le=400)
    """Longer sentences are parted: a policy speaks about as much at once as it was trained on."""
    max_n_best: int = Field(default=8, ge=1)


class StreamingConfig(Config):
    """When sound leaves the server.

    The first window is small, so that the first sound comes soon; later ones grow, because each
    renders the sentence from its start.
    """

    first_window_frames: int = Field(default=40, gt=0)
    window_growth: float = Field(default=1.4, ge=1)
    max_window_frames: int = Field(default=150, gt=0)
    """Of growth from one window to the next."""
    piece_tokens: int = Field(default=8, gt=0)
    """Tokens that leave the engine's process at once."""
    settling_frames: int = Field(default=24, ge=0)
    """Frames that the NAR model sees beyond one before it decides about it."""
    first_settling_frames: int = Field(default=12, ge=0)
    """The same in the first window; a frame more for every four that follow."""
    lookahead_frames: int = Field(default=12, ge=0)
    """Settled frames beyond one before it is heard: the reach of the codec's decoder."""
    crossfade_ms: float = Field(default=10.0, ge=0)
    """At the joins of two windows."""
    pause_s: float = Field(default=0.15, ge=0, le=5)
    """Of silence between sentences."""
    piece_timeout_s: float = Field(default=30.0, gt=0)
    """A stream that waits longer than this for its next piece ends with an error."""

    @model_validator(mode="after")
    def _first_window_is_heard(self) -> "StreamingConfig":
        unheard = self.settling_of(self.first_window_frames) + self.lookahead_frames
        if self.first_window_frames <= unheard:
            raise ValueError(
                f"first_window_frames {self.first_window_frames} must exceed "
                f"first_settling_frames and lookahead_frames, {unheard} together, or the first "
                "window has no sound"
            )
        return self

    def settling_of(self, num_frames: int) -> int:
        """Return the settling frames of a window of so many known ones."""
        more = max(num_frames - self.first_window_frames, 0) // 4
        return min(self.first_settling_frames + more, self.settling_frames)


class VoicesConfig(Config):
    """Who can be asked for."""

    golden: Path
    """Golden codec tokens; each of its chosen speakers is a voice."""
    speakers: tuple[str, ...] = ()
    """Of the golden tokens; empty: all."""
    aliases: dict[Name, Name] = Field(default_factory=dict)
    """Other names of voices, e.g. those that OpenAI's clients ask for."""
    speaker_frames: int = Field(default=100, gt=0)
    """Of a recording that make a voice; 100 frames are 2 s of the embedded codec."""
    uploads: Path | None = None
    """A folder that all replicas share, for voices that people upload; none: no uploads."""
    max_uploads: int = Field(default=1000, gt=0)
    min_upload_s: float = Field(default=2.5, gt=0)
    max_upload_s: float = Field(default=30.0, gt=0)


class LimitsConfig(Config):
    """What a client may ask for; a key may have limits of its own."""

    max_input_characters: int = Field(default=4096, gt=0)
    max_body_bytes: int = Field(default=65_536, gt=0)
    max_upload_bytes: int = Field(default=10_000_000, gt=0)
    body_timeout_s: float = Field(default=20.0, gt=0)
    """For a client that stops in the middle of its body."""
    requests_per_minute: int = Field(default=600, gt=0)
    """Of one key, in one replica of the ingress."""
    max_streams: int = Field(default=24, gt=0)
    """At once in one replica of the ingress; further requests are told to come back (429)."""
    retry_after_s: int = Field(default=2, gt=0)


class AccessConfig(Config):
    """Who may ask."""

    keys_file: Path | None = None
    """YAML: a list of `{name, key}`, and limits of the key if they differ."""
    keys_env: str = "SPEECHALIGN_API_KEYS"
    """An environment variable with `name:key` or `key`, several separated by commas."""
    allow_anonymous: bool = False
    """No keys at all: only for an endpoint that nobody else can reach."""


class ServingConfig(Config):
    """An endpoint."""

    codec: CodecConfig = EmbeddedCodecConfig()
    nar: Path
    policies: dict[Name, ServedPolicyConfig] = Field(min_length=1)
    engine: GenerationEngineConfig = VllmConfig(max_num_seqs=32, kv_cache_mib=256)
    speaking: SpeakingConfig = SpeakingConfig()
    rendering: RenderingConfig = RenderingConfig()
    streaming: StreamingConfig = StreamingConfig()
    voices: VoicesConfig
    limits: LimitsConfig = LimitsConfig()
    access: AccessConfig = AccessConfig()
    ingress_replicas: ReplicasConfig = ReplicasConfig(max_ongoing_requests=64)
    speaker_replicas: ReplicasConfig = ReplicasConfig()
    renderer_replicas: ReplicasConfig = ReplicasConfig()
    pcm_sample_rate_hz: int = Field(default=24_000, ge=8_000, le=48_000)
    """Of raw PCM, which cannot say its rate: OpenAI's clients take it for 24 kHz."""
    drain_s: float = Field(default=300.0, gt=0)
    """A replica that ends may finish its streams for as long; it ends when the last one has.

    4,096 characters, the longest input, are 293 s of speech, spoken as fast as they are heard.
    """

    @model_validator(mode="after")
    def _an_answer_fits_the_engine(self) -> "ServingConfig":
        if self.speaking.max_new_tokens >= self.engine.max_model_len:
            raise ValueError(
                f"speaking.max_new_tokens {self.speaking.max_new_tokens} leaves no room for a "
                f"prompt in engine.max_model_len {self.engine.max_model_len}"
            )
        return self


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
