"""Preference losses: tensors in, tensors out. Shape: B pairs.

DPO      Rafailov et al. 2023, eq. 7
cDPO     Mitchell 2023, "A note on DPO with noisy preferences", eq. 3
IPO      Azar et al. 2023, eq. 17
anchor   Pang et al. 2024 (RPO), eq. 3, with the loss per token of the chosen answer

Left out: SimPO, KTO and robust DPO, which the strategies bring.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from speechalign.config.dpo import DpoLossConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLogprobs:
    """Log-probabilities of both answers of each pair under one model, summed over tokens."""

    chosen_B: Tensor
    rejected_B: Tensor
    chosen_tokens_B: Tensor
    """How many tokens the sums are over."""
    rejected_tokens_B: Tensor

    def normalised(self) -> "PairLogprobs":
        """Return means over tokens in place of sums."""
        return PairLogprobs(
            chosen_B=self.chosen_B / self.chosen_tokens_B,
            rejected_B=self.rejected_B / self.rejected_tokens_B,
            chosen_tokens_B=self.chosen_tokens_B,
            rejected_tokens_B=self.rejected_tokens_B,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DpoOutput:
    """What to minimise and what to log, pair by pair: whoever averages knows the world's size."""

    loss_B: Tensor
    anchor_B: Tensor
    """Loss per token of the chosen answer, not yet weighted."""
    chosen_reward_B: Tensor
    """beta * (policy - reference), detached."""
    rejected_reward_B: Tensor

    @property
    def margin_B(self) -> Tensor:
        """How much better the policy's implicit reward says the chosen answer is."""
        return self.chosen_reward_B - self.rejected_reward_B


def dpo_loss(policy: PairLogprobs, reference: PairLogprobs, config: DpoLossConfig) -> DpoOutput:
    """Return the loss of each pair.

    Args:
        policy: with gradients.
        reference: without.
        config: the variant, and whether answers count by the sum or the mean of their tokens.
    """
    anchor_B = -policy.chosen_B / policy.chosen_tokens_B
    if config.logprobs == "length_normalised":
        policy, reference = policy.normalised(), reference.normalised()
    chosen_B = policy.chosen_B - reference.chosen_B
    rejected_B = policy.rejected_B - reference.rejected_B
    gap_B = chosen_B - rejected_B
    if config.variant == "ipo":
        loss_B = (gap_B - 1 / (2 * config.beta)) ** 2
    else:
        smoothing = config.label_smoothing
        loss_B = -(1 - smoothing) * F.logsigmoid(config.beta * gap_B) - smoothing * F.logsigmoid(
            -config.beta * gap_B
        )
    return DpoOutput(
        loss_B=loss_B + config.sft_weight * anchor_B,
        anchor_B=anchor_B,
        chosen_reward_B=config.beta * chosen_B.detach(),
        rejected_reward_B=config.beta * rejected_B.detach(),
    )


def loss_of_an_unmoved_policy(config: DpoLossConfig) -> float:
    """Return the loss at step 0, where policy and reference agree, without the anchor."""
    if config.variant == "ipo":
        return 1 / (2 * config.beta) ** 2
    return float(torch.log(torch.tensor(2.0)))
