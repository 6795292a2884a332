"""What the embedded corpus is made of."""

from pathlib import Path

from pydantic import Field

from speechalign.config.base import Config


class CorpusConfig(Config):
    """Sources and amounts of the embedded corpus."""

    output: Path = Path(".cache/corpus")
    """Where clips and features go; about 1.5 GB, outside of git."""
    seed: int = 0
    num_processes: int = Field(default=2, gt=0)
    num_train_sentences: int = Field(default=6000, gt=0, le=50_000)
    """The grammar has a few times as many."""
    num_heldout_sentences: int = Field(default=400, gt=0, le=5_000)
    train_factors: tuple[float, ...] = (
        0.84, 0.87, 0.90, 0.93, 0.96, 0.99, 1.02, 1.05, 1.08, 1.11, 1.15, 1.19,
    )  # fmt: skip
    """Resampling factors: each makes one pseudo-speaker of the synthetic voice."""
    heldout_factors: tuple[float, ...] = (0.885, 0.975, 1.035, 1.095)
    """Pseudo-speakers that no training clip has; they speak the held-out sentences."""
    num_flite_sentences: int = Field(default=150, ge=0)
    flite_voices: tuple[str, ...] = ("rms", "awb", "slt", "kal16")
    foreign_languages: tuple[str, ...] = ("es", "fr", "it", "ru")
    foreign_minutes: float = Field(default=10.0, ge=0)
    """Human speech without transcripts, per language: voices for the codec to learn from."""
    num_heldout_human: int = Field(default=25, ge=0)
