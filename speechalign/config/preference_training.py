"""How a policy is trained on pairs."""

from typing import Literal

from pydantic import Field, model_validator

from speechalign.config.base import Config
from speechalign.config.training import EngineConfig, WorkersConfig


class DpoLossConfig(Config):
    """The DPO loss and its anchor."""

    variant: Literal["sigmoid", "cdpo", "robust", "ipo", "simpo", "kto"] = "sigmoid"
    """cdpo and robust expect wrong labels (`label_smoothing`); simpo has no reference; kto does
    not compare the answers of a pair with each other."""
    logprobs: Literal["summed", "length_normalised"] = "summed"
    """Of an answer: the sum over its tokens (Rafailov et al. 2023), or their mean."""
    beta: float = Field(default=0.1, gt=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """The share of wrong labels: cdpo hedges against it, robust corrects for it."""
    target_margin: float = Field(default=0.0, ge=0)
    """SimPO's gamma, in units of beta times nats a token."""
    desirable_weight: float = Field(default=1.0, gt=0)
    """KTO's, of the chosen answers."""
    undesirable_weight: float = Field(default=1.0, gt=0)
    """KTO's, of the rejected answers."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Of the anchor: the mean over pairs of the chosen answer's loss per token."""

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> "DpoLossConfig":
        expects_errors = self.variant in ("cdpo", "robust")
        if expects_errors != (self.label_smoothing > 0):
            raise ValueError("label_smoothing is of cdpo and robust, which need it above 0")
        if self.target_margin and self.variant != "simpo":
            raise ValueError("target_margin is simpo's; remove it or set variant to simpo")
        if self.variant == "simpo" and self.logprobs != "length_normalised":
            raise ValueError("simpo compares means over tokens; set logprobs: length_normalised")
        if self.variant == "kto" and self.logprobs != "summed":
            raise ValueError("kto's reference point is a KL of whole answers; set logprobs: summed")
        if self.variant != "kto" and (self.desirable_weight, self.undesirable_weight) != (1, 1):
            raise ValueError("desirable_weight and undesirable_weight are kto's; remove them")
        return self


class EarlyStopConfig(Config):
    """When training has gone far enough, or too far."""

    every: int = Field(default=10, gt=0)
    """Updates between two looks at the held-out pairs."""
    patience: int = Field(default=3, gt=0)
    """Looks without a better held-out loss, after which training stops."""
    max_chosen_drop: float = Field(default=0.05, gt=0)
    """Nats per token that held-out chosen answers may lose in one training."""


class PreferenceTrainingConfig(Config):
    """A training on pairs, complete.

    dpo: the chosen answer is preferred to the rejected (`loss`). sft: only the chosen is learned;
    golden pairs make that the paper's continued SFT, ranked ones best-of-N fine-tuning. coh:
    both are learned, each behind a word that says how good it is (chain of hindsight). best_of_n:
    nothing is learned; the reward picks one of `evaluation.best_of` samples.
    """

    method: Literal["dpo", "sft", "coh", "best_of_n"] = "dpo"
    seed: int = 0
    num_epochs: int = Field(default=2, gt=0)
    pairs_per_step: int = Field(default=8, gt=0)
    """Pairs a micro-batch, over all workers."""
    heldout_share: float = Field(default=0.1, gt=0, lt=1)
    """Of the prompts: their pairs are measured, never trained on."""
    max_logprob_difference: float = Field(default=1e-4, gt=0)
    """Between sampler and trainer, per token; more stops the run."""
    checkpoint_every: int = Field(default=20, gt=0)
    """Updates; a killed training goes on from the last checkpoint."""
    loss: DpoLossConfig = DpoLossConfig()
    early_stop: EarlyStopConfig = EarlyStopConfig()
    engine: EngineConfig = EngineConfig(learning_rate=3e-5, warmup_steps=10)
    workers: WorkersConfig = WorkersConfig()

    @model_validator(mode="after")
    def _every_worker_has_a_pair(self) -> "PreferenceTrainingConfig":
        if self.pairs_per_step < self.workers.num_workers:
            raise ValueError(
                f"{self.workers.num_workers} workers cannot share {self.pairs_per_step} pairs a "
                "step; raise pairs_per_step or lower workers.num_workers"
            )
        return self

    @model_validator(mode="after")
    def _the_loss_is_dpos(self) -> "PreferenceTrainingConfig":
        if self.method != "dpo" and self.loss != DpoLossConfig():
            raise ValueError(f"training.loss is of dpo; {self.method} has nothing to set there")
        return self
