"""Online DPO: the best against the worst of every group, as soon as they are judged.

Guo et al. 2024, "Direct language model alignment from online AI feedback", algorithm 1, with a
reward in place of the annotator, as in TRL's OnlineDPOTrainer. Unlike there: the best and the worst
of a group that may be larger than two; ties, small margins and equal answers make no pair;
log-probs are at the temperature of the sampling, TRL's at 1.

Left out, and why:
    an annotator of pairs (Guo et al.)     our judges hear one answer at a time
    SLiC (Guo et al.)                      the losses are those of `dpo`, which has none
    more pairs of a group than one         they would share answers, and differ less
    TRL's penalty of an answer not ended   masked, it is in no pair; kept, a reward term can do that
    TRL's list of betas, one an epoch      a stream of prompts has no epochs

Shapes: B pairs; a batch holds the chosen answers, then the rejected ones.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from speechalign.policy.answer_batch import AnswerBatch, collate_answers
from speechalign.training.engine import global_sum, world
from speechalign.training.losses import PairLogprobs, PairLoss, dpo_loss
from speechalign.training.online_base import NotFinite, OnlineTask, TrainedPolicy
from speechalign.training.rollouts import Rollout, groups_of
from speechalign.training.running_means import RunningMeans

MEANS = (
    "loss",
    "accuracy",
    "margin",
    "chosen_logprob",
    "rejected_logprob",
    "entropy",
    "tied_groups",
)

Pair = tuple[Rollout, Rollout]
"""Chosen, rejected."""


class OnlineDpo:
    """Learns from the pairs of one batch of rollouts after another."""

    def __init__(self, task: OnlineTask, policy: TrainedPolicy) -> None:
        self._task, self._config, self._policy = task, task.config, policy

    def state(self) -> dict[str, float]:
        """Return what a checkpoint must keep beside the weights: nothing."""
        return {}

    def restore(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint."""

    def learn(self, rollouts: Sequence[Rollout], step: int) -> dict[str, float]:
        """Update the weights; return what all ranks saw.

        Args:
            rollouts: of this rank; whole groups, at least one answer.
            step: of the training; the order of the pairs does not depend on it.

        Raises:
            NotFinite: the loss is not a number, on any rank.
        """
        del step
        means = RunningMeans(MEANS)
        found = [
            best_and_worst(
                [r for r in group if self._task.can_learn_from(r)],
                self._config.online_dpo.min_margin,
            )
            for group in groups_of(rollouts)
        ]
        means.add("tied_groups", torch.tensor([float(pair is None) for pair in found]))
        pairs = [pair for pair in found if pair is not None]
        for _ in range(self._config.num_epochs):
            for rows in np.array_split(np.arange(len(pairs)), self._config.num_minibatches):
                self._update([pairs[row] for row in rows], rollouts[0], means)
        return means.over_ranks(self._policy.engine.device)

    def _update(self, pairs: Sequence[Pair], placeholder: Rollout, means: RunningMeans) -> None:
        """Move the weights once; every rank runs as many micro-batches as the others."""
        device = self._policy.engine.device
        count = global_sum(torch.tensor(float(len(pairs)), device=device))
        if not count:
            return
        num_micro = self._task.num_micro_batches
        scale = world()[1] * num_micro / count  # DeepSpeed averages over ranks and micro-batches
        for rows in np.array_split(np.arange(len(pairs)), num_micro):
            part = [pairs[row] for row in rows] or [(placeholder, placeholder)]
            loss_B = self._loss(part, means if len(rows) else None)
            total = loss_B.sum() * float(len(rows) > 0)
            if not torch.isfinite(global_sum(total)):
                raise NotFinite("the loss is not a number")
            self._policy.engine.update(total * scale)

    def _loss(self, pairs: Sequence[Pair], means: RunningMeans | None) -> Tensor:
        rows = [chosen.row for chosen, _ in pairs] + [rejected.row for _, rejected in pairs]
        batch = collate_answers(rows).to(self._policy.engine.device)
        logprobs_BS, entropy_BS = self._policy.forward(batch)
        reference_BS, _ = self._policy.reference(batch)
        policy, reference = _pairs_of(logprobs_BS, batch), _pairs_of(reference_BS, batch)
        output = dpo_loss(policy, reference, self._config.online_dpo.loss)
        if means is not None:
            means.add("entropy", entropy_BS[batch.answer_mask_BS])
            _record(means, output, policy)
        return output.loss_B


def best_and_worst(group: Sequence[Rollout], min_margin: float) -> Pair | None:
    """Return the answers of the highest and the lowest reward, the first of equals.

    None: they are closer than the margin, or the same tokens.
    """
    judged = [(rollout.reward, rollout) for rollout in group if rollout.reward is not None]
    if not judged:
        return None
    best, chosen = max(judged, key=lambda item: item[0])
    worst, rejected = min(judged, key=lambda item: item[0])
    if best - worst < min_margin or chosen.token_ids == rejected.token_ids:
        return None
    return chosen, rejected


def _pairs_of(logprobs_BS: Tensor, batch: AnswerBatch) -> PairLogprobs:
    summed_B, tokens_B = logprobs_BS.sum(1), batch.answer_mask_BS.sum(1)
    count = len(summed_B) // 2
    return PairLogprobs(
        chosen_B=summed_B[:count],
        rejected_B=summed_B[count:],
        chosen_tokens_B=tokens_B[:count],
        rejected_tokens_B=tokens_B[count:],
    )


def _record(means: RunningMeans, output: PairLoss, policy: PairLogprobs) -> None:
    per_token = policy.normalised()
    means.add("loss", output.loss_B)
    means.add("accuracy", output.margin_B > 0)
    means.add("margin", output.margin_B)
    means.add("chosen_logprob", per_token.chosen_B)
    means.add("rejected_logprob", per_token.rejected_B)
