"""What the online methods share: the task, and the policy with its reference.

Shapes: B answers, S positions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from speechalign.config.online_training import OnlineTrainingConfig
from speechalign.policy.answer_batch import AnswerBatch
from speechalign.policy.logprobs import answer_logprobs, token_entropies
from speechalign.training.engine import Engine
from speechalign.training.rollouts import Rollout


class NotFinite(Exception):
    """A loss is not a number: the run stops and keeps its best policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineTask:
    """What is learned, from answers drawn how."""

    config: OnlineTrainingConfig
    temperature: float
    samples_per_prompt: int

    @property
    def num_micro_batches(self) -> int:
        """Of a weight update, on every rank: what the most answers that it can have need."""
        config = self.config
        groups = config.prompts_per_step // config.workers.num_workers // config.num_minibatches
        answers = 2 if config.method == "online_dpo" else self.samples_per_prompt
        return math.ceil(groups * answers / config.answers_per_forward)

    def can_learn_from(self, rollout: Rollout) -> bool:
        """Whether an answer has a loss: a reward, and tokens, and an end where that is asked for.

        One without may still be what others are compared with (GRPO).
        """
        is_cut = rollout.is_truncated and self.config.truncated == "masked"
        return rollout.reward is not None and bool(rollout.token_ids) and not is_cut


class TrainedPolicy:
    """The policy in its engine, and the frozen reference, at the temperature of the sampling."""

    def __init__(self, engine: Engine, reference: nn.Module, temperature: float) -> None:
        self.engine = engine
        self._reference = reference
        self._temperature = temperature

    def forward(self, batch: AnswerBatch) -> tuple[Tensor, Tensor]:
        """Return (logprob_BS, entropy_BS) of the answers; the entropy without gradients."""
        with self.engine.autocast():
            return _scored(self.engine.module, batch, self._temperature)

    def reference(self, batch: AnswerBatch) -> tuple[Tensor, Tensor]:
        """Return the same of the reference."""
        with self.engine.autocast(), torch.no_grad():
            return _scored(self._reference, batch, self._temperature)


def _scored(model: nn.Module, batch: AnswerBatch, temperature: float) -> tuple[Tensor, Tensor]:
    logits_BSV = model(
        input_ids=batch.input_ids_BS, attention_mask=batch.attention_mask_BS, use_cache=False
    ).logits
    logits_BSV = logits_BSV.float() / temperature
    logprobs_BS = answer_logprobs(logits_BSV, batch.input_ids_BS, batch.answer_mask_BS)
    with torch.no_grad():
        entropies_BS = token_entropies(logits_BSV, batch.answer_mask_BS)
    return logprobs_BS, entropies_BS


class Learner(Protocol):
    """Turns rollouts into weight updates."""

    def learn(self, rollouts: Sequence[Rollout], step: int) -> dict[str, float]:
        """Update the weights; return what all ranks saw."""
        ...

    def state(self) -> dict[str, float]:
        """Return what a checkpoint must keep beside the weights."""
        ...

    def restore(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint."""
        ...
