"""How a model is trained: the engine, the workers, and supervised fine-tuning."""

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from speechalign.config.base import Config
from speechalign.config.policy import ArConfig, NarConfig


class EngineConfig(Config):
    """The DeepSpeed engine and its optimizer."""

    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 computes in bfloat16 by autocast; weights and optimizer stay in float32."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    num_accumulated: int = Field(default=1, gt=0)
    """Micro-batches a weight update."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of the layers, AdamW for embeddings and norms."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Of AdamW."""
    muon_learning_rate: float = Field(default=0.01, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    decay_share: float = Field(default=0.0, ge=0, le=1)
    """The last share of the steps, over which the learning rate falls linearly."""
    final_share: float = Field(default=0.03, ge=0, le=1)
    """What is left of the learning rate at the end."""

    @model_validator(mode="after")
    def _muon_needs_whole_matrices(self) -> "EngineConfig":
        if self.optimizer == "muon" and self.zero_stage:
            raise ValueError("muon needs whole matrices, ZeRO cuts them up; set zero_stage to 0")
        return self


class WorkersConfig(Config):
    """The Ray Train workers."""

    num_workers: int = Field(default=2, gt=0)
    cpus_per_worker: float = Field(default=1.0, gt=0)
    gpus_per_worker: float = Field(default=0.0, ge=0)
    label_selector: dict[str, str] = Field(default_factory=dict[str, str])
    """Labels of the nodes that the workers may live on, e.g. {speechalign-pool: train}."""
    threads_per_worker: int = Field(default=1, gt=0)
    max_failures: int = Field(default=2, ge=0)
    """Restarts from the last checkpoint before the run gives up."""


class TrainingJob(Config):
    """What the jobs share that make one model from one set of data."""

    output: Path
    """Where the model is committed; checkpoints and metrics go to `<output>-work`."""
    seed: int = 0
    num_steps: int = Field(gt=0)
    rows_per_step: int = Field(default=20, gt=0)
    """Clips, or pairs, a micro-batch, over all workers."""
    log_every: int = Field(default=50, gt=0)
    heldout_every: int = Field(default=500, gt=0)
    checkpoint_every: int = Field(default=500, gt=0)
    engine: EngineConfig = EngineConfig()
    workers: WorkersConfig = WorkersConfig()

    @model_validator(mode="after")
    def _every_worker_has_a_row(self) -> "TrainingJob":
        if self.rows_per_step < self.workers.num_workers:
            raise ValueError(
                f"{self.workers.num_workers} workers cannot share {self.rows_per_step} rows a "
                "step; raise rows_per_step or lower workers.num_workers"
            )
        return self


class SftBase(TrainingJob):
    """What both supervised jobs share."""

    golden: Path
    """Golden codec tokens: the Parquet file of `speechalign prepare`."""
    num_heldout: int = Field(default=64, gt=0)


class SftArConfig(SftBase):
    """Train the AR model: text and speaker prefix to the codes of the first level(s)."""

    kind: Literal["ar"] = "ar"
    model: ArConfig = ArConfig()


class SftNarConfig(SftBase):
    """Train the NAR model: each further level from the levels before it."""

    kind: Literal["nar"] = "nar"
    model: NarConfig = NarConfig()
    crop_frames: int = Field(default=100, gt=0)
    level_weights: tuple[float, ...] = (3.0, 2.0, 1.0)
    """How often level 2, 3, ... is trained."""


SftConfig: TypeAlias = Annotated[SftArConfig | SftNarConfig, Field(discriminator="kind")]


class RewardModelConfig(TrainingJob):
    """A file for `speechalign reward-model`: Bradley-Terry on the pairs of a run."""

    kind: Literal["reward_model"] = "reward_model"
    policy: Path
    """The AR policy that it listens with."""
    train_policy: bool = False
    """Whether that policy's weights learn too, and not the head alone."""
    pairs: tuple[Path, ...] = Field(min_length=1)
    """Folders with pairs, of `speechalign pair`."""
    heldout_share: float = Field(default=0.1, gt=0, lt=1)
    """Of the prompts: their pairs are measured, never trained on."""
    measured_pairs: tuple[Path, ...] = ()
    """Folders with pairs that are only measured, e.g. of recordings that the policy was not trained
    on: it knows its training data, and the held-out pairs do not tell."""

    @model_validator(mode="after")
    def _weights_are_whole(self) -> "RewardModelConfig":
        if self.engine.zero_stage == 3:
            raise ValueError(
                "zero_stage 3 scatters the weights with which the best update is measured; use 2"
            )
        return self


TrainingConfig: TypeAlias = Annotated[
    SftArConfig | SftNarConfig | RewardModelConfig, Field(discriminator="kind")
]


class SftJob(Config):
    """A file for `speechalign sft`."""

    sft: SftConfig
