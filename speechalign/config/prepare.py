"""How a user's recordings become golden codec tokens."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from speechalign.config.base import Config
from speechalign.config.codec import CodecConfig, EmbeddedCodecConfig
from speechalign.config.sampling import PoolConfig


class InputConfig(Config):
    """Where the recordings and their transcripts are."""

    kind: Literal["manifest", "librispeech", "libritts", "vctk", "ljspeech"]
    path: Path
    """A JSONL, CSV or Parquet file with path, text, speaker (and id, split: train or heldout); or
    the root of a corpus."""


class AudioLimits(Config):
    """What a recording may be."""

    min_duration_s: float = Field(default=0.3, gt=0)
    max_duration_s: float = Field(default=30.0, gt=0)
    min_sample_rate_hz: int = Field(default=8000, gt=0)
    max_sample_rate_hz: int = Field(default=96000, gt=0)
    max_channels: int = Field(default=8, gt=0)
    max_peak: float = Field(default=1.5, gt=0)
    """Of float samples; anything louder was not scaled as audio."""
    min_peak: float = Field(default=1e-3, gt=0)
    """Quieter recordings are silence."""


class PrepareConfig(Config):
    """A run of `speechalign prepare`."""

    input: InputConfig
    output: Path
    """Becomes a committed folder with golden.parquet and quarantine.parquet."""
    codec: CodecConfig = EmbeddedCodecConfig()
    limits: AudioLimits = AudioLimits()
    seed: int = 0
    heldout_share: float = Field(default=0.1, ge=0, lt=1)
    """Of the speakers, if there are two or more; else of the recordings."""
    pool: PoolConfig = PoolConfig(num_actors=2, num_cpus=1.0, batch_size=16)
