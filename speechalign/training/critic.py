"""PPO's critic in its own engine: Schulman et al. 2017, eq. 9, its value loss, clipped.

Left out, and why:
    a network shared with the policy       two losses on the same weights need a balance (c1 there)
    the start from a reward model          (Ouyang et al. 2022, C.4) see policy.value_model
    returns scaled to variance 1           the offset takes the mean out; value_clip_range is in the
                                           reward's units

Shapes: B answers, S positions.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from speechalign.config.online_training import OnlineTrainingConfig
from speechalign.policy.answer_batch import AnswerBatch
from speechalign.policy.value_model import ValueModel
from speechalign.training.engine import Engine, global_sum
from speechalign.training.online_base import NotFinite
from speechalign.training.policy_losses import clipped_value_loss
from speechalign.training.running_means import RunningMeans


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueTargets:
    """What the critic said when the answers arrived, and what it should have said."""

    old_BS: Tensor
    returns_BS: Tensor


class Critic:
    """A value model that learns beside the policy."""

    def __init__(self, config: OnlineTrainingConfig, policy: Path, num_micro: int) -> None:
        model = ValueModel.of_policy(policy)
        engine_config = config.ppo.critic_engine.model_copy(update={"num_accumulated": num_micro})
        num_updates = config.num_steps * config.updates_per_step
        self._clip_range = config.ppo.value_clip_range
        self.engine = Engine(model, engine_config, num_updates)

    def expect(self, reward: Tensor) -> None:
        """Say this number of every answer, beside what is learned; all ranks must say the same.

        A critic that starts at zero is wrong by the mean reward. With GAE's lambda below 1 that
        error differs along an answer, and whitened it would drown what the rewards differ by.
        """
        model = self.engine.unwrapped
        assert isinstance(model, ValueModel)  # noqa: S101 - the constructor made it
        model.offset.copy_(reward)

    @torch.no_grad()
    def values(self, batch: AnswerBatch) -> Tensor:
        """Return value_BS just before each token of the answers."""
        with self.engine.autocast():
            return self.engine.module(batch)

    def update(
        self, batch: AnswerBatch, targets: ValueTargets | None, scale: Tensor, means: RunningMeans
    ) -> None:
        """Learn from a micro-batch.

        Args:
            batch: answers.
            targets: none for a placeholder, whose mask is empty.
            scale: of the sum of the losses.
            means: gets the loss.

        Raises:
            NotFinite: the loss is not a number, on any rank.
        """
        with self.engine.autocast():
            values_BS = self.engine.module(batch)
        loss_BS = values_BS * 0.0
        if targets is not None:
            loss_BS = clipped_value_loss(
                values_BS, targets.old_BS, targets.returns_BS, self._clip_range
            )
            means.add("value_loss", loss_BS[batch.answer_mask_BS])
        total = (loss_BS * batch.answer_mask_BS).sum()
        if not torch.isfinite(global_sum(total)):
            raise NotFinite("the critic's loss is not a number")
        self.engine.update(total * scale)
