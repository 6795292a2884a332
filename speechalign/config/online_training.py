"""How a policy is trained on answers that it gives while it is trained."""

from typing import Literal

from pydantic import Field, model_validator

from speechalign.config.base import Config
from speechalign.config.judges import JudgeConfig
from speechalign.config.preference_training import DpoLossConfig
from speechalign.config.training import EngineConfig, WorkersConfig


class KlConfig(Config):
    """What it costs to leave the reference."""

    coefficient: float = Field(default=0.0, ge=0)
    """Of the KL: in PPO's reward per token (k1), in GRPO's loss (k3). The reference is
    loaded at 0 too: `guards.max_kl` is the distance from it."""
    controller: Literal["fixed", "adaptive"] = "fixed"
    target: float = Field(default=0.01, gt=0)
    """Nats a token that the adaptive controller steers to."""
    horizon_steps: float = Field(default=20.0, gt=0)
    """Steps in which an adaptive coefficient changes by a fifth, if the KL stays off target."""

    @model_validator(mode="after")
    def _the_controller_has_something_to_do(self) -> "KlConfig":
        if self.controller == "adaptive" and not self.coefficient:
            raise ValueError("an adaptive controller multiplies kl.coefficient: start above 0")
        return self


class PpoConfig(Config):
    """Actor and critic."""

    clip_range: float = Field(default=0.2, gt=0)
    value_clip_range: float = Field(default=0.2, gt=0)
    """Around the values at the time of the rollout."""
    discount: float = Field(default=1.0, gt=0, le=1)
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    whiten_advantages: bool = True
    """To mean 0 and variance 1 over the tokens of all ranks."""
    critic_warmup_steps: int = Field(default=0, ge=0)
    """Steps in which the critic learns and the policy does not."""
    critic_engine: EngineConfig = EngineConfig(learning_rate=1e-4)


class GrpoConfig(Config):
    """Groups in place of a critic."""

    divides_by_std: bool = True
    """Shao et al. 2024, section 4.1.2; without: Dr. GRPO (Liu et al. 2025)."""
    clip_low: float = Field(default=0.2, gt=0)
    clip_high: float = Field(default=0.28, gt=0)
    """Above clip_low: DAPO's clip-higher (Yu et al. 2025, eq. 10)."""
    normalised_over: Literal["sequences", "tokens"] = "tokens"
    """Whether every answer counts the same (GRPO), or every token (DAPO, eq. 12)."""


class OnlineDpoConfig(Config):
    """The best against the worst of each group, as soon as they are judged."""

    loss: DpoLossConfig = DpoLossConfig()
    min_margin: float = Field(default=0.1, gt=0)
    """Of their rewards; below it the group teaches nothing."""


class HeldoutConfig(Config):
    """Prompts whose answers are judged, never learned from: what the best policy is chosen by."""

    every: int = Field(default=5, gt=0)
    """Steps between two looks; there is one at the start and one at the end."""
    num_prompts: int = Field(default=32, gt=0)
    answers_per_prompt: int = Field(default=2, gt=0)
    judges: tuple[JudgeConfig, ...] = ()
    """They hear these answers only, beside the recipe's `judges`, and never make a reward: what the
    reward does not see. To let them hear every rollout would cost as much as the reward."""


class OnlineGuardsConfig(Config):
    """What stops a run that collapses. The best policy so far is kept."""

    max_kl: float = Field(default=0.5, gt=0)
    """Nats a token (k1) from the reference."""
    min_stop_share: float = Field(default=0.5, ge=0, le=1)
    """Of the answers of a step that end by themselves."""
    min_entropy_share: float = Field(default=0.3, ge=0, le=1)
    """Of the entropy that the first step had."""
    max_length_growth: float = Field(default=0.5, gt=0)
    """Of the held-out answers' mean length against the first look; 0.5: half as long again."""
    max_wer_growth: float | None = Field(default=0.5, gt=0)
    """Of the held-out answers' `eval_wer` against the first look (or 1 %, if that was less); 0.5:
    half as many errors again. It needs a recogniser in `heldout.judges`; null takes it away."""
    patience: int = Field(default=4, gt=0)
    """Looks without a better held-out reward."""


class OnlineTrainingConfig(Config):
    """A training that samples as it goes.

    ppo: actor and critic (Schulman et al. 2017; Ouyang et al. 2022). grpo: advantages within the
    group of a prompt (Shao et al. 2024). online_dpo: pairs of the newest answers (Guo et al. 2024).
    """

    method: Literal["ppo", "grpo", "online_dpo"]
    seed: int = 0
    num_steps: int = Field(default=20, gt=0)
    """Batches of rollouts."""
    prompts_per_step: int = Field(default=16, gt=0)
    """Over all workers; each is answered `sampling.samples_per_prompt` times."""
    max_staleness: Literal[0, 1] = 0
    """Steps that the sampling policy is behind; 1 lets it sample while the next is trained."""
    num_epochs: int = Field(default=1, gt=0)
    """Times that each rollout is learned from."""
    num_minibatches: int = Field(default=1, gt=0)
    """Weight updates an epoch."""
    answers_per_forward: int = Field(default=16, gt=0)
    """Of one worker: what fits into its memory."""
    truncated: Literal["masked", "kept"] = "masked"
    """Answers that hit the length cap: left out of the loss (DAPO, section 3.4), or not. grpo
    compares the others with them all the same; ppo and online_dpo leave them out altogether."""
    importance_cap: float = Field(default=2.0, gt=1)
    """Of the weight trainer / sampler of a token, when rollouts are stale (Yao et al. 2025)."""
    max_logprob_difference: float = Field(default=1e-3, gt=0)
    """Between sampler and trainer on the probe, per token; more stops the run."""
    publication_timeout_s: float = Field(default=1800.0, gt=0)
    """How long a sampler waits for the weights that it needs."""
    checkpoint_every: int = Field(default=5, gt=0)
    """Steps; a killed run goes on from the last one."""
    kl: KlConfig = KlConfig()
    ppo: PpoConfig = PpoConfig()
    grpo: GrpoConfig = GrpoConfig()
    online_dpo: OnlineDpoConfig = OnlineDpoConfig()
    heldout: HeldoutConfig = HeldoutConfig()
    guards: OnlineGuardsConfig = OnlineGuardsConfig()
    engine: EngineConfig = EngineConfig(learning_rate=3e-5, warmup_steps=2)
    workers: WorkersConfig = WorkersConfig(cpus_per_worker=0.25)

    @property
    def updates_per_step(self) -> int:
        """Weight updates a batch of rollouts."""
        return self.num_epochs * self.num_minibatches

    @model_validator(mode="after")
    def _actor_and_critic_share_a_device(self) -> "OnlineTrainingConfig":
        if self.method == "ppo" and self.ppo.critic_engine.device != self.engine.device:
            raise ValueError(
                f"the critic learns on {self.ppo.critic_engine.device}, the policy on "
                f"{self.engine.device}; set ppo.critic_engine.device too"
            )
        return self

    @model_validator(mode="after")
    def _blocks_are_equal(self) -> "OnlineTrainingConfig":
        parts = self.workers.num_workers * self.num_minibatches
        if self.prompts_per_step % parts:
            raise ValueError(
                f"prompts_per_step {self.prompts_per_step} is no multiple of num_workers x "
                f"num_minibatches = {parts}: every worker gets whole groups, as many as the others"
            )
        if self.heldout.num_prompts % self.workers.num_workers:
            raise ValueError("heldout.num_prompts must be a multiple of workers.num_workers")
        return self

    @model_validator(mode="after")
    def _accumulation_is_counted_here(self) -> "OnlineTrainingConfig":
        for engine in (self.engine, self.ppo.critic_engine):
            if engine.num_accumulated != 1:
                raise ValueError(
                    "num_accumulated follows from answers_per_forward; remove it from the engine"
                )
        return self

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> "OnlineTrainingConfig":
        others = {"ppo": PpoConfig(), "grpo": GrpoConfig(), "online_dpo": OnlineDpoConfig()}
        for name, untouched in others.items():
            if name != self.method and getattr(self, name) != untouched:
                raise ValueError(f"training.{name} is set, but training.method is {self.method}")
        if self.online_dpo.loss.variant == "kto":
            raise ValueError("kto learns from stored pairs: set training.method to dpo")
        if self.method == "online_dpo" and self.kl != KlConfig():
            raise ValueError("training.kl is of ppo and grpo; DPO's beta keeps to the reference")
        return self
