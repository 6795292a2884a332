"""PPO and GRPO: rollouts to weight updates.

PPO    Schulman et al. 2017, eq. 7, with GAE; for language models Ouyang et al. 2022, section 3.5:
       the reward at the last token, a KL cost (k1) at every one
GRPO   Shao et al. 2024, eq. 3 and 4: advantages within a group, k3 in the loss; DAPO (Yu et al.
       2025): clip-higher, groups without variance dropped, truncated answers masked, means over
       tokens; Dr. GRPO (Liu et al. 2025): no division by the standard deviation

Truncated answers, masked: PPO leaves them out altogether. GRPO compares the others with them (mean
and deviation are over all judged answers of a group, as in TRL), but they have no loss, and means
of losses are over the other answers or their tokens. (TRL's mean over answers counts a 0 for them.)

Left out, and why:
    DAPO's refilling of dropped groups     a step has its prompts beforehand; it counts them instead
    DAPO's soft length penalty             a reward term can do that
    Dr. GRPO's fixed divisor of a loss     `tokens` weighs them alike; Adam hardly feels the scale
    GRPO's rewards of single steps         judges hear whole answers
    GRPO's new reward model now and then   the best version is found by comparing rewards of steps
    PPO's mix with pre-training            it needs the golden data here; a KL cost can do that
    an entropy bonus                       a guard stops a run whose entropy falls

Both learn from answers drawn at the sampling temperature, so logits are divided by it here too.

Shapes: B answers, S positions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from speechalign.policy.answer_batch import AnswerBatch, collate_answers
from speechalign.seeds import derive_seed
from speechalign.training.advantages import (
    KlController,
    gae,
    group_advantages,
    rewards_per_token,
    whitened,
    whitening,
)
from speechalign.training.critic import Critic, ValueTargets
from speechalign.training.engine import global_sum, world
from speechalign.training.online_base import NotFinite, OnlineTask, TrainedPolicy
from speechalign.training.policy_losses import (
    clipped_policy_loss,
    importance_weights,
    kl_k1,
    kl_k3,
)
from speechalign.training.rollouts import Rollout, gathered, groups_of, spread
from speechalign.training.running_means import RunningMeans

MEANS = (
    "policy_loss", "entropy", "kl_k1", "kl_k3", "clip_fraction", "ratio", "advantage",
    "importance_weight", "value_loss", "value_error", "zero_variance_groups", "kept_answers",
)  # fmt: skip
"""`zero_variance_groups` is the share, of all groups of a step, of those that teach nothing: equal
rewards, fewer than two of them, or every answer masked."""
LARGEST = ("largest_sampler_difference",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """An answer and what to learn from it; one value a token of the answer."""

    rollout: Rollout
    advantages: Tensor
    old_logprobs: Tensor | None = None
    """Of the policy when the answer arrived; none where the policy has not moved since."""
    reference_logprobs: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None


class PolicyGradient:
    """Learns from one batch of rollouts after another."""

    def __init__(self, task: OnlineTask, policy: TrainedPolicy, critic: Critic | None) -> None:
        self._task, self._config = task, task.config
        self._policy, self._critic = policy, critic
        self._kl = KlController(task.config.kl)
        self._over_tokens = critic is not None or task.config.grpo.normalised_over == "tokens"

    def state(self) -> dict[str, float]:
        """Return what a checkpoint must keep beside the weights."""
        return {"kl_coefficient": self._kl.coefficient}

    def restore(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint."""
        self._kl.coefficient = state["kl_coefficient"]

    def learn(self, rollouts: Sequence[Rollout], step: int) -> dict[str, float]:
        """Update the weights; return what all ranks saw.

        Args:
            rollouts: of this rank; whole groups, at least one answer.
            step: of the training.

        Raises:
            NotFinite: the loss is not a number, on any rank.
        """
        means = RunningMeans(MEANS, LARGEST)
        placeholder = rollouts[0]
        if self._critic is None:
            learned = self._with_frozen(self._group_relative(rollouts, means), placeholder)
        else:
            usable = [r for r in rollouts if self._task.can_learn_from(r)]
            learned = self._with_frozen(list(map(_unjudged, usable)), placeholder)
            if step == 0:
                self._expect_the_mean(learned, self._critic)
            learned = self._actor_critic(learned, self._critic, placeholder, means)
        means.add("kept_answers", torch.tensor([len(learned) / len(rollouts)]))
        for epoch in range(self._config.num_epochs):
            rng = np.random.default_rng(derive_seed(self._config.seed, "minibatches", step, epoch))
            order = rng.permutation(len(learned))
            for rows in np.array_split(order, self._config.num_minibatches):
                self._update([learned[row] for row in rows], placeholder, step, means)
        values = means.over_ranks(self._policy.engine.device)
        if "kl_k1" in values:
            self._kl.see(values["kl_k1"])
        return values | {"kl_coefficient": self._kl.coefficient}

    def _group_relative(self, rollouts: Sequence[Rollout], means: RunningMeans) -> list[Experience]:
        learned: list[Experience] = []
        for group in groups_of(rollouts):
            taught = self._compared(group)
            means.add("zero_variance_groups", torch.tensor([float(not taught)]))
            learned += taught
        return learned

    def _compared(self, group: Sequence[Rollout]) -> list[Experience]:
        """Return the answers to learn from, by how they compare with all judged ones."""
        judged = [rollout for rollout in group if rollout.reward is not None]
        rewards_G = torch.tensor([rollout.reward for rollout in judged], dtype=torch.float32)
        advantages_G = group_advantages(rewards_G, divides_by_std=self._config.grpo.divides_by_std)
        if advantages_G is None:
            return []
        return [
            replace(_unjudged(rollout), advantages=advantage.expand(len(rollout.token_ids)))
            for rollout, advantage in zip(judged, advantages_G, strict=True)
            if self._task.can_learn_from(rollout)
        ]

    def _with_frozen(self, learned: Sequence[Experience], placeholder: Rollout) -> list[Experience]:
        """Add the log-probs of the policy as it is now, and of the reference, where needed.

        With one update a step and no KL, what the policy says in the update is what it said
        before: the pass is saved.
        """
        needs_reference = self._config.kl.coefficient > 0 or self._critic is not None
        if not needs_reference and self._config.updates_per_step == 1:
            return list(learned)
        done: list[Experience] = []
        for items, batch in self._passes(learned, placeholder):
            with torch.no_grad():
                old_BS, _ = self._policy.forward(batch)
                reference_BS, _ = self._policy.reference(batch)
            olds = gathered(old_BS, batch.answer_mask_BS)
            references = gathered(reference_BS, batch.answer_mask_BS)
            done += [
                replace(item, old_logprobs=olds[row], reference_logprobs=references[row])
                for row, item in enumerate(items)
            ]
        return done

    def _actor_critic(
        self,
        judged: Sequence[Experience],
        critic: Critic,
        placeholder: Rollout,
        means: RunningMeans,
    ) -> list[Experience]:
        config, learned = self._config.ppo, list[Experience]()
        for items, batch in self._passes(judged, placeholder):
            values_BS = critic.values(batch)
            if not items:
                continue
            mask_BS = batch.answer_mask_BS
            advantages_BS, returns_BS = gae(
                self._rewards(items, mask_BS),
                values_BS,
                mask_BS,
                config.discount,
                config.gae_lambda,
            )
            means.add("value_error", (values_BS - returns_BS)[mask_BS].square())
            advantages, values, returns = (
                gathered(found_BS, mask_BS) for found_BS in (advantages_BS, values_BS, returns_BS)
            )
            learned += [
                replace(item, advantages=advantages[row], values=values[row], returns=returns[row])
                for row, item in enumerate(items)
            ]
        return self._whitened(learned) if config.whiten_advantages else learned

    def _expect_the_mean(self, learned: Sequence[Experience], critic: Critic) -> None:
        rewards = [item.rollout.reward or 0.0 for item in learned]
        device = self._policy.engine.device
        # Named, because without an answer both are integers, and the other ranks' are not.
        mine = torch.tensor([sum(rewards), len(rewards)], dtype=torch.float32, device=device)
        total, count = global_sum(mine)
        critic.expect(total / count.clamp(min=1))

    def _rewards(self, items: Sequence[Experience], mask_BS: Tensor) -> Tensor:
        rewards = [item.rollout.reward for item in items]
        olds = [item.old_logprobs for item in items if item.old_logprobs is not None]
        references = [
            item.reference_logprobs for item in items if item.reference_logprobs is not None
        ]
        divergence_BS = kl_k1(spread(olds, mask_BS), spread(references, mask_BS))
        terminal_B = torch.tensor(rewards, dtype=torch.float32, device=mask_BS.device)
        return rewards_per_token(terminal_B, divergence_BS, mask_BS, self._kl.coefficient)

    def _whitened(self, learned: Sequence[Experience]) -> list[Experience]:
        """Whiten over the tokens of all ranks: every rank must call it."""
        mine = whitening([item.advantages for item in learned]) if learned else torch.zeros(3)
        sums = global_sum(mine.to(self._policy.engine.device))
        return [replace(item, advantages=whitened(item.advantages, sums)) for item in learned]

    def _passes(
        self, items: Sequence[Experience], placeholder: Rollout
    ) -> Iterator[tuple[list[Experience], AnswerBatch]]:
        """Yield all answers of a step in as many passes on every rank (ZeRO-3 needs that)."""
        count = self._task.num_micro_batches * self._config.num_minibatches
        return self._batches(items, placeholder, count)

    def _batches(
        self, items: Sequence[Experience], placeholder: Rollout, count: int
    ) -> Iterator[tuple[list[Experience], AnswerBatch]]:
        """Yield exactly `count` batches, sorted by length; one without answers has no mask."""
        ordered = sorted(items, key=lambda item: sum(map(len, item.rollout.row)))
        for rows in np.array_split(np.arange(len(ordered)), count):
            part = [ordered[row] for row in rows]
            batch = collate_answers([item.rollout.row for item in part] or [placeholder.row])
            if not part:
                nothing_BS = torch.zeros_like(batch.answer_mask_BS)
                batch = replace(batch, answer_mask_BS=nothing_BS)
            yield part, batch.to(self._policy.engine.device)

    def _update(
        self, minibatch: Sequence[Experience], placeholder: Rollout, step: int, means: RunningMeans
    ) -> None:
        """Move the weights once."""
        lengths = [len(item.advantages) for item in minibatch]
        mine = float(sum(lengths) if self._over_tokens else len(lengths))
        count = global_sum(torch.tensor(mine, device=self._policy.engine.device))
        if not count:
            return
        num_micro = self._task.num_micro_batches
        scale = world()[1] * num_micro / count  # DeepSpeed averages over ranks and micro-batches
        learns = self._critic is None or step >= self._config.ppo.critic_warmup_steps
        for items, batch in self._batches(minibatch, placeholder, num_micro):
            if self._critic is not None:
                self._critic.update(batch, _targets(items, batch), scale, means)
            if learns:
                self._policy_step(items, batch, scale, means)

    def _policy_step(
        self, items: Sequence[Experience], batch: AnswerBatch, scale: Tensor, means: RunningMeans
    ) -> None:
        mask_BS = batch.answer_mask_BS
        logprobs_BS, entropy_BS = self._policy.forward(batch)
        loss_BS = logprobs_BS * 0.0  # of a placeholder: a gradient, and it is zero
        if items:
            loss_BS = self._token_loss(items, logprobs_BS, mask_BS, means)
            means.add("entropy", entropy_BS[mask_BS])
            means.add("policy_loss", loss_BS[mask_BS])
        loss_B = (loss_BS * mask_BS).sum(1)
        if not self._over_tokens:
            loss_B = loss_B / mask_BS.sum(1).clamp(min=1)
        total = loss_B.sum()
        if not torch.isfinite(global_sum(total)):
            raise NotFinite("the policy's loss is not a number")
        self._policy.engine.update(total * scale)

    def _token_loss(
        self, items: Sequence[Experience], logprobs_BS: Tensor, mask_BS: Tensor, means: RunningMeans
    ) -> Tensor:
        config = self._config
        olds = [item.old_logprobs for item in items if item.old_logprobs is not None]
        old_BS = spread(olds, mask_BS) if olds else logprobs_BS.detach()
        sampled = [torch.tensor(item.rollout.sampler_logprobs) for item in items]
        sampled_BS = spread(sampled, mask_BS)
        advantages_BS = spread([item.advantages for item in items], mask_BS)
        clipped = clipped_policy_loss(logprobs_BS, old_BS, advantages_BS, *self._clip_range)
        loss_BS = clipped.loss_BS
        if config.max_staleness:
            weights_BS = importance_weights(old_BS, sampled_BS, config.importance_cap)
            means.add("importance_weight", weights_BS[mask_BS])
            loss_BS = loss_BS * weights_BS
        else:
            means.see("largest_sampler_difference", (old_BS - sampled_BS).abs()[mask_BS])
        references = [i.reference_logprobs for i in items if i.reference_logprobs is not None]
        if references:
            reference_BS = spread(references, mask_BS)
            k3_BS = kl_k3(logprobs_BS, reference_BS)
            means.add("kl_k1", kl_k1(old_BS, reference_BS)[mask_BS])
            means.add("kl_k3", k3_BS[mask_BS])
            if self._critic is None:  # PPO's cost is in its rewards
                loss_BS = loss_BS + self._kl.coefficient * k3_BS
        means.add("clip_fraction", clipped.is_clipped_BS[mask_BS])
        means.add("ratio", clipped.ratio_BS[mask_BS])
        means.add("advantage", advantages_BS[mask_BS])
        return loss_BS

    @property
    def _clip_range(self) -> tuple[float, float]:
        if self._critic is not None:
            return self._config.ppo.clip_range, self._config.ppo.clip_range
        return self._config.grpo.clip_low, self._config.grpo.clip_high


def _unjudged(rollout: Rollout) -> Experience:
    return Experience(rollout=rollout, advantages=torch.zeros(len(rollout.token_ids)))


def _targets(items: Sequence[Experience], batch: AnswerBatch) -> ValueTargets | None:
    if not items:
        return None
    values = [item.values for item in items if item.values is not None]
    returns = [item.returns for item in items if item.returns is not None]
    mask_BS = batch.answer_mask_BS
    return ValueTargets(old_BS=spread(values, mask_BS), returns_BS=spread(returns, mask_BS))
