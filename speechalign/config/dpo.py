"""How a policy is trained on pairs."""

from typing import Literal

from pydantic import Field

from speechalign.config.base import Config
from speechalign.config.training import EngineConfig, WorkersConfig


class DpoLossConfig(Config):
    """The DPO loss and its anchor."""

    variant: Literal["sigmoid", "ipo"] = "sigmoid"
    logprobs: Literal["summed", "length_normalised"] = "summed"
    """Of an answer: the sum over its tokens (Rafailov et al. 2023), or their mean."""
    beta: float = Field(default=0.1, gt=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Above 0: conservative DPO (Mitchell 2023), labels that may be wrong. Sigmoid only."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Of the anchor: the mean over pairs of the chosen answer's loss per token."""


class EarlyStopConfig(Config):
    """When training has gone far enough, or too far."""

    every: int = Field(default=10, gt=0)
    """Updates between two looks at the held-out pairs."""
    patience: int = Field(default=3, gt=0)
    """Looks without a better held-out loss, after which training stops."""
    max_chosen_drop: float = Field(default=0.05, gt=0)
    """Nats per token that held-out chosen answers may lose against the reference."""


class DpoTrainingConfig(Config):
    """DPO, complete."""

    seed: int = 0
    num_epochs: int = Field(default=2, gt=0)
    pairs_per_step: int = Field(default=8, gt=0)
    """Pairs a micro-batch, over all workers."""
    heldout_share: float = Field(default=0.1, gt=0, lt=1)
    """Of the prompts: their pairs are measured, never trained on."""
    max_logprob_difference: float = Field(default=1e-4, gt=0)
    """Between sampler and trainer, per token; more stops the run."""
    loss: DpoLossConfig = DpoLossConfig()
    early_stop: EarlyStopConfig = EarlyStopConfig()
    engine: EngineConfig = EngineConfig(learning_rate=3e-5, warmup_steps=10)
    workers: WorkersConfig = WorkersConfig()
