"""What the AR and NAR models are."""

from pydantic import Field, model_validator

from speechalign.config.base import Config


class ArConfig(Config):
    """A Llama-shaped causal language model over text symbols and codec codes."""

    num_layers: int = Field(default=6, gt=0)
    hidden_size: int = Field(default=256, gt=0)
    num_heads: int = Field(default=4, gt=0)
    max_positions: int = Field(default=1024, gt=0)
    num_codebooks: int = Field(default=1, gt=0)
    """RVQ levels that the AR model predicts; the NAR model fills the others."""
    prefix_frames: int = Field(default=25, ge=0)
    """Codec frames of the speaker at the start of every prompt."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "ArConfig":
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )
        return self


class NarConfig(Config):
    """A convolutional model that predicts each codec level from the ones before it."""

    hidden_size: int = Field(default=256, gt=0)
    dilations: tuple[int, ...] = (1, 2, 4, 8, 1, 2, 4, 1)
    num_levels: int = Field(default=4, ge=2)
    """Levels the model knows, level 1 included."""
    speaker_frames: int = Field(default=100, gt=0)
    """Codec frames of the speaker prompt that the voice is pooled from."""
