"""What held-out answers say of a policy in training, and when it must stop.

The answers were drawn by the policy itself, so its log-probs of them are what KL and entropy are
estimated from (Schulman 2020): no pass of the policy is needed, one of the reference is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from speechalign.config.online_training import OnlineGuardsConfig
from speechalign.policy.answer_batch import collate_answers
from speechalign.training.engine import global_sum, world
from speechalign.training.online_base import TrainedPolicy
from speechalign.training.policy_losses import kl_k1, kl_k3
from speechalign.training.rollouts import Rollout, gathered
from speechalign.training.running_means import RunningMeans

JUDGED = "judge_"
"""Begins the name of a judge's mean: a user's judge may be called like what guards look at."""
LEAST_WER = 0.01
"""A lower WER of the first look counts as this: one wrong word after none is no collapse."""


def look_at(
    rollouts: Sequence[Rollout], policy: TrainedPolicy, answers_per_forward: int
) -> dict[str, float]:
    """Return reward, stop share, length, entropy and KL of held-out answers, over all ranks.

    Entropy and KL are per token, of the policy that drew the answers.
    """
    means = RunningMeans(["reward", "stop_share", "length", "entropy", "kl_k1", "kl_k3"])
    rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
    means.add("reward", torch.tensor(rewards))
    means.add("stop_share", torch.tensor([not rollout.is_truncated for rollout in rollouts]))
    means.add("length", torch.tensor([len(rollout.token_ids) for rollout in rollouts]))
    for first in range(0, len(rollouts), answers_per_forward):
        part = rollouts[first : first + answers_per_forward]
        sampled = [torch.tensor(rollout.sampler_logprobs) for rollout in part]
        for own_A, reference_A in zip(sampled, _reference(part, policy), strict=True):
            means.add("entropy", -own_A)
            means.add("kl_k1", kl_k1(own_A, reference_A))
            means.add("kl_k3", kl_k3(own_A, reference_A))
    return means.over_ranks(policy.engine.device)


def rewards_of_all(rollouts: Sequence[Rollout], device: torch.device) -> list[float | None]:
    """Return the rewards of the held-out answers of all ranks, each answer at its own place.

    Every rank has as many, and asks the same prompts at every look.
    """
    rank, num_ranks = world()
    table = torch.zeros(2, num_ranks, len(rollouts))
    for place, rollout in enumerate(rollouts):
        if rollout.reward is not None:
            table[:, rank, place] = torch.tensor([rollout.reward, 1.0])
    values, are_measured = global_sum(table.to(device)).flatten(1).tolist()
    return [
        value if is_measured else None
        for value, is_measured in zip(values, are_measured, strict=True)
    ]


def wer_of(judged: Mapping[str, float]) -> dict[str, float]:
    """Return `wer` of held-out answers, nothing if no independent recogniser heard them.

    It is wrong words by words, as in the evaluation; the means are of the same answers, so their
    ratio is that of the sums. A judge that measures `eval_wer` alone counts answers, not words.

    Args:
        judged: means over all ranks, each by JUDGED and its measure.
    """
    names = ("eval_word_errors", "eval_words", "eval_wer")
    errors, words, wer = (judged.get(JUDGED + name) for name in names)
    if errors is not None and words:
        wer = errors / words
    return {} if wer is None else {"wer": wer}


def _reference(rollouts: Sequence[Rollout], policy: TrainedPolicy) -> list[Tensor]:
    batch = collate_answers([rollout.row for rollout in rollouts]).to(policy.engine.device)
    reference_BS, _ = policy.reference(batch)
    return [values.cpu() for values in gathered(reference_BS, batch.answer_mask_BS)]


@dataclass(slots=True, kw_only=True)
class Looks:
    """The best look so far."""

    num_warmup_steps: int = 0
    """Steps in which the policy does not move; the looks then are of the start, and not counted."""
    best_step: int = 0
    best_reward: float = float("-inf")
    best_rewards: list[float | None] = field(default_factory=list[float | None])
    """Of each held-out answer at the best look."""
    num_since_best: int = 0
    first_entropy: float = 0.0
    first_length: float = 0.0
    first_wer: float | None = None
    """None: nobody has measured it."""
    last_step: int = -1

    def see(
        self,
        step: int,
        look: Mapping[str, float],
        rewards: Sequence[float | None],
        guards: OnlineGuardsConfig,
    ) -> str | None:
        """Remember a look; return why training must stop, or nothing.

        A look that a guard refuses is never the best one. Two looks are compared by the answers
        that have a reward at both: a judge that fails at hard ones would flatter a policy.

        Args:
            step: how many the policy has behind it.
            look: what `look_at` found.
            rewards: of each held-out answer, at the same place at every look.
            guards: the limits.
        """
        self.last_step = step
        if not self.first_entropy:
            self.first_entropy = look["entropy"]
        if not self.first_length:
            self.first_length = look["length"]
        if self.first_wer is None:
            self.first_wer = look.get("wer")
        reason = self._refused(step, look, guards)
        if reason is not None:
            return reason
        if self._is_better(rewards):
            self.best_step, self.best_reward, self.num_since_best = step, look["reward"], 0
            self.best_rewards = list(rewards)
            return None
        if step <= self.num_warmup_steps:
            return None
        self.num_since_best += 1
        if self.num_since_best >= guards.patience:
            return (
                f"step {step}: the held-out reward was not above {self.best_reward:.4f} of step "
                f"{self.best_step} for {self.num_since_best} looks"
            )
        return None

    def _is_better(self, rewards: Sequence[float | None]) -> bool:
        if not self.best_rewards:
            return any(reward is not None for reward in rewards)
        both = zip(rewards, self.best_rewards, strict=True)
        gains = [now - best for now, best in both if now is not None and best is not None]
        return sum(gains) > 0

    def _refused(
        self, step: int, look: Mapping[str, float], guards: OnlineGuardsConfig
    ) -> str | None:
        if look["kl_k1"] > guards.max_kl:
            return (
                f"step {step}: the policy is {look['kl_k1']:.3f} nats a token from the reference, "
                f"more than guards.max_kl {guards.max_kl}"
            )
        if look["entropy"] < guards.min_entropy_share * self.first_entropy:
            return (
                f"step {step}: the entropy fell from {self.first_entropy:.3f} to "
                f"{look['entropy']:.3f} nats a token, below guards.min_entropy_share "
                f"{guards.min_entropy_share}"
            )
        if look["length"] > (1 + guards.max_length_growth) * self.first_length:
            return (
                f"step {step}: the held-out answers grew from {self.first_length:.1f} to "
                f"{look['length']:.1f} tokens, by more than guards.max_length_growth "
                f"{guards.max_length_growth:.0%}"
            )
        return self._misheard(step, look, guards) or self.guard_step(look, step, guards)

    def _misheard(
        self, step: int, look: Mapping[str, float], guards: OnlineGuardsConfig
    ) -> str | None:
        first, growth = self.first_wer, guards.max_wer_growth
        if first is None or growth is None:
            return None
        if "wer" not in look:  # as in evaluation.guards: who is not watched any more may be worse
            return (
                f"step {step}: the held-out WER, {first:.1%} at the first look, is measured of no "
                "answer any more; guards.max_wer_growth: null does without it"
            )
        if look["wer"] > (1 + growth) * max(first, LEAST_WER):
            return (
                f"step {step}: the held-out WER grew from {first:.1%} to {look['wer']:.1%}, by "
                f"more than guards.max_wer_growth {growth:.0%}"
            )
        return None

    def guard_step(
        self, values: Mapping[str, float], step: int, guards: OnlineGuardsConfig
    ) -> str | None:
        """Return why training must stop after a step, or nothing."""
        if values["stop_share"] < guards.min_stop_share:
            return (
                f"step {step}: only {values['stop_share']:.0%} of the answers end by themselves, "
                f"guards.min_stop_share is {guards.min_stop_share:.0%}"
            )
        return None


def idle_share(busy: Sequence[tuple[float, float]], start_s: float, end_s: float) -> float:
    """Return the share of the time in which nobody was busy.

    Args:
        busy: (from, until) of anybody's work, in any order, overlapping or not.
        start_s: of the time that counts.
        end_s: of the time that counts.
    """
    covered, reached = 0.0, start_s
    for begin, end in sorted(busy):
        covered += max(0.0, min(end, end_s) - max(begin, reached))
        reached = max(reached, end)
    return 1 - covered / max(end_s - start_s, 1e-9)
