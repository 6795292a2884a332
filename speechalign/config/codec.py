"""Which codec turns speech into codes, and how the embedded one is trained."""

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from speechalign.config.base import Config

ENCODEC_BANDWIDTHS_KBPS = (1.5, 3.0, 6.0, 12.0, 24.0)
"""What the 24 kHz model was trained for."""


class EmbeddedCodecConfig(Config):
    """The codec that the package carries: neural codes over vocoder features, 16 kHz."""

    kind: Literal["embedded"] = "embedded"
    path: Path | None = None
    """A directory with config.json, model.safetensors, manifest.json; none: the package's own."""


class EncodecPackageConfig(Config):
    """EnCodec at 24 kHz from the `encodec` package, weights in a local directory."""

    kind: Literal["encodec"] = "encodec"
    path: Path
    """The directory of `encodec_24khz-d7cc33bc.th`."""
    bandwidth_kbps: float = 6.0
    """One of `ENCODEC_BANDWIDTHS_KBPS`."""

    @field_validator("bandwidth_kbps")
    @classmethod
    def _is_offered(cls, value: float) -> float:
        if value not in ENCODEC_BANDWIDTHS_KBPS:
            raise ValueError(
                f"EnCodec at 24 kHz has no {value} kbps; choose of {ENCODEC_BANDWIDTHS_KBPS}"
            )
        return value


class EncodecHfConfig(Config):
    """EnCodec from transformers."""

    kind: Literal["encodec_hf"] = "encodec_hf"
    model: str = "facebook/encodec_24khz"
    """A local directory or a hub id."""
    bandwidth_kbps: float = Field(default=6.0, gt=0)


CodecConfig: TypeAlias = Annotated[
    EmbeddedCodecConfig | EncodecPackageConfig | EncodecHfConfig, Field(discriminator="kind")
]


class EmbeddedModelConfig(Config):
    """The shape of the embedded codec's network; the defaults have 4.7 million parameters."""

    num_features: int = Field(default=43, gt=2)
    """Of a 10 ms vocoder frame."""
    hidden_dim: int = Field(default=256, gt=0)
    latent_dim: int = Field(default=64, gt=0)
    post_dim: int = Field(default=96, gt=0)
    num_acoustic_codebooks: int = Field(default=7, ge=1)
    codebook_size: int = Field(default=1024, gt=1)
    content_dilations: tuple[int, ...] = (1, 2, 4, 1, 2)
    acoustic_dilations: tuple[int, ...] = (1, 2, 1)
    decoder_dilations: tuple[int, ...] = (1, 2, 4, 1, 2, 1)
    post_dilations: tuple[int, ...] = (1, 2)


class AugmentConfig(Config):
    """Pseudo-speakers made in feature space, so that readers never heard are coded too."""

    probability: float = Field(default=0.7, ge=0, le=1)
    max_log_f0_shift: float = Field(default=0.45, gt=0)
    max_f0_range_scale: float = Field(default=1.3, ge=1)
    max_warp: float = Field(default=1.18, ge=1)
    """The largest factor by which formants move."""
    max_gain: float = Field(default=0.8, ge=0)
    """Of the log power envelope, in nepers."""
    spectral_shape: float = Field(default=0.35, ge=0)
    """The spread of a random, smooth, constant equaliser, in nepers."""


class PhaseConfig(Config):
    """One phase of the codec's training."""

    num_steps: int = Field(gt=0)
    batch_size: int = Field(default=16, gt=0)
    learning_rate: float = Field(default=1e-3, gt=0)
    num_warmup_steps: int = Field(default=100, ge=0)
    num_unquantised_steps: int = Field(default=200, ge=0)
    """Steps before codes are used; the codebooks start from what was learned by then."""


class CodecTrainingConfig(Config):
    """A training of the embedded codec, complete."""

    corpus_dir: Path
    out_dir: Path
    seed: int = 0
    num_threads: int = Field(default=2, ge=1)
    crop_frames: int = Field(default=100, gt=1)
    """In frames of 20 ms."""
    sampling_power: float = Field(default=0.5, ge=0, le=1)
    """A source is drawn in proportion to its minutes to this power."""
    teacher_dim: int = Field(default=384, gt=0)
    log_every_steps: int = Field(default=100, gt=0)
    checkpoint_every_steps: int = Field(default=500, gt=0)
    model: EmbeddedModelConfig = EmbeddedModelConfig()
    augment: AugmentConfig = AugmentConfig()
    content: PhaseConfig
    acoustics: PhaseConfig

    @model_validator(mode="after")
    def _quantises(self) -> "CodecTrainingConfig":
        for name, phase in (("content", self.content), ("acoustics", self.acoustics)):
            if phase.num_unquantised_steps >= phase.num_steps:
                raise ValueError(
                    f"{name}: {phase.num_unquantised_steps} of {phase.num_steps} steps do not "
                    "quantise, so no codebook is ever learned; lower num_unquantised_steps"
                )
        return self


class EncodeCorpusConfig(Config):
    """A corpus to encode with the embedded codec."""

    corpus_dir: Path
    codec_dir: Path | None = None
    """None: the package's own."""
    out_file: Path
    num_levels: int = Field(default=8, ge=1)
    num_threads: int = Field(default=2, ge=1)
