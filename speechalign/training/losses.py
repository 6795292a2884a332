"""Losses on pairs: tensors in, tensors out. Shape: B pairs.

DPO      Rafailov et al. 2023, eq. 7
cDPO     Mitchell 2023, "A note on DPO with noisy preferences", eq. 3
robust   Chowdhury et al. 2024, "Provably robust DPO", eq. 12
IPO      Azar et al. 2023, eq. 17
SimPO    Meng et al. 2024, eq. 6
KTO      Ethayarajh et al. 2024, eq. 8: each answer against the reference point z0 (`kl`), an
         estimate of KL(policy || reference) from answers under other prompts' texts. It needs no
         pairs: one side of a row may be empty
anchor   Pang et al. 2024 (RPO), eq. 3, with the loss per token of the chosen answer
CoH      Liu et al. 2023, "Chain of Hindsight", eq. 1, one answer a row: both sides are learned,
         and what differs is the feedback in their prompts (policy.prompt_format)

Left out: APO (D'Oosterlinck et al. 2024), which asks whether the policy is better or worse than
what is chosen: golden answers and its own best ones would each want another form of it. Weights of
KTO that follow from how many answers are good: whoever labels knows, and sets them.
"""

import math
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn import functional as F

from speechalign.config.preference_training import DpoLossConfig, PreferenceTrainingConfig
from speechalign.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """How a model speaks the answers of each pair against a reference, without gradients.

    In nats, means over tokens.
    """

    entropy_B: Tensor
    kl_k1_B: Tensor
    """KL(reference || model) of the answers that a policy drew (Schulman 2020)."""
    kl_k3_B: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLogprobs:
    """Log-probabilities of both answers of each pair under one model, summed over tokens."""

    chosen_B: Tensor
    rejected_B: Tensor
    chosen_tokens_B: Tensor
    """How many tokens the sums are over; 0 where the side is empty (a labelled answer)."""
    rejected_tokens_B: Tensor
    drift: Drift | None = None
    """From a reference, if asked for."""

    @property
    def has_chosen_B(self) -> Tensor:
        """Whether there is a chosen answer."""
        return self.chosen_tokens_B > 0

    @property
    def has_rejected_B(self) -> Tensor:
        """Whether there is a rejected answer."""
        return self.rejected_tokens_B > 0

    @property
    def num_sides_B(self) -> Tensor:
        """2, or 1 of a labelled answer."""
        return self.has_chosen_B.int() + self.has_rejected_B.int()

    def normalised(self) -> "PairLogprobs":
        """Return means over tokens in place of sums; 0 where there is no token."""
        return replace(
            self,
            chosen_B=self.chosen_B / self.chosen_tokens_B.clamp(min=1),
            rejected_B=self.rejected_B / self.rejected_tokens_B.clamp(min=1),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLoss:
    """What to minimise and what to log, pair by pair: whoever averages knows the world's size."""

    loss_B: Tensor
    anchor_B: Tensor
    """Loss per token of the chosen answer, not yet weighted; 0 where there is none."""
    chosen_reward_B: Tensor
    """beta * (policy - reference), detached; 0 where there is no answer, as `rejected_reward_B`."""
    rejected_reward_B: Tensor

    @property
    def margin_B(self) -> Tensor:
        """How much better the policy's implicit reward says the chosen answer is."""
        return self.chosen_reward_B - self.rejected_reward_B


def pair_loss(
    policy: PairLogprobs,
    reference: PairLogprobs,
    config: PreferenceTrainingConfig,
    kl: float = 0.0,
) -> PairLoss:
    """Return the loss of each pair, by the method.

    `kl` is KTO's reference point. The implicit rewards are logged for every method; only DPO
    learns from them.
    """
    dpo = dpo_loss(policy, reference, config.loss, kl)
    match config.method:
        case "dpo":
            return dpo
        case "sft":
            return replace(dpo, loss_B=dpo.anchor_B)
        case "coh":
            return replace(dpo, loss_B=dpo.anchor_B - policy.normalised().rejected_B)
        case "best_of_n":
            raise ConfigError("best_of_n trains nothing")


def dpo_loss(
    policy: PairLogprobs, reference: PairLogprobs, config: DpoLossConfig, kl: float = 0.0
) -> PairLoss:
    """Return the DPO loss of each pair.

    Args:
        policy: with gradients.
        reference: without.
        config: the variant, and whether answers count by the sum or the mean of their tokens.
        kl: KTO's reference point; the others have none.
    """
    anchor_B = -policy.normalised().chosen_B
    if config.logprobs == "length_normalised":
        policy, reference = policy.normalised(), reference.normalised()
    chosen_B = policy.chosen_B - reference.chosen_B
    rejected_B = policy.rejected_B - reference.rejected_B
    free_gap_B = policy.chosen_B - policy.rejected_B
    if config.variant == "kto":
        good_B, bad_B = _kto(chosen_B, rejected_B, config, kl)
        both_B = good_B * policy.has_chosen_B + bad_B * policy.has_rejected_B
        loss_B = both_B / policy.num_sides_B
    else:
        loss_B = _by_variant(chosen_B - rejected_B, free_gap_B, config)
    return PairLoss(
        loss_B=loss_B + config.sft_weight * anchor_B,
        anchor_B=anchor_B,
        chosen_reward_B=config.beta * chosen_B.detach(),
        rejected_reward_B=config.beta * rejected_B.detach(),
    )


def _kto(
    chosen_B: Tensor, rejected_B: Tensor, config: DpoLossConfig, kl: float
) -> tuple[Tensor, Tensor]:
    """Return what the good and the bad answer of each pair cost."""
    good_B = config.desirable_weight * (1 - F.sigmoid(config.beta * (chosen_B - kl)))
    bad_B = config.undesirable_weight * (1 - F.sigmoid(config.beta * (kl - rejected_B)))
    return good_B, bad_B


def reference_point(differences: Tensor, count: Tensor) -> float:
    """Return KTO's z0 of summed differences policy - reference and their number: never below 0.

    The sums are over the mismatched answers of all ranks; a number has no gradient.
    """
    return max(0.0, float(differences / count.clamp(min=1)))


def _by_variant(gap_B: Tensor, free_gap_B: Tensor, config: DpoLossConfig) -> Tensor:
    """Return the loss of how much more than the reference, or at all, the chosen is preferred."""
    beta, wrong = config.beta, config.label_smoothing
    agrees_B, flipped_B = F.logsigmoid(beta * gap_B), F.logsigmoid(-beta * gap_B)
    match config.variant:
        case "sigmoid":
            return -agrees_B
        case "cdpo":
            return -(1 - wrong) * agrees_B - wrong * flipped_B
        case "robust":
            return (-(1 - wrong) * agrees_B + wrong * flipped_B) / (1 - 2 * wrong)
        case "ipo":
            return (gap_B - 1 / (2 * beta)) ** 2
        case "simpo":
            return -F.logsigmoid(beta * free_gap_B - config.target_margin)
        case "kto":
            raise ConfigError("kto knows no gap between the answers of a pair")


def loss_of_an_unmoved_policy(config: DpoLossConfig, good_share: float = 0.5) -> float | None:
    """Return the loss at step 0, where policy and reference agree, without the anchor.

    None: it depends on the policy (SimPO has no reference).

    Args:
        config: the loss.
        good_share: of the answers, for KTO: half of those in pairs.
    """
    match config.variant:
        case "simpo":
            return None
        case "ipo":
            return 1 / (2 * config.beta) ** 2
        case "kto":
            good, bad = config.desirable_weight, config.undesirable_weight
            return (good * good_share + bad * (1 - good_share)) / 2
        case "sigmoid" | "cdpo" | "robust":
            return math.log(2)
