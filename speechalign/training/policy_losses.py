"""Losses of policy gradients, token by token: tensors in, tensors out.

clipped policy   Schulman et al. 2017 (PPO), eq. 7; two ranges: Yu et al. 2025 (DAPO), eq. 10
clipped value    Schulman et al. 2017, as in OpenAI's baselines; half the squared error
k1, k3           Schulman 2020, "Approximating KL divergence"
importance cap   Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy
                 training": truncated weights of tokens that another version has drawn

Left out, and why:
    dual clipping (Ye et al. 2020)         for much older rollouts: ours are a step old at most
    sequence ratios (GSPO)                 of most use to mixtures of experts, whose ratios jump
    k2, k3 weighted by the ratio           k3 is as GRPO has it, though its gradient is not the KL's
    sequences masked for their mismatch    the cap bounds what a token that drifted can do

Shapes: B answers, S positions. Who averages knows the world's size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ClippedLoss:
    """What to minimise, and how often the clip held a token back."""

    loss_BS: Tensor
    is_clipped_BS: Tensor
    ratio_BS: Tensor


def clipped_policy_loss(
    logprobs_BS: Tensor, old_BS: Tensor, advantages_BS: Tensor, clip_low: float, clip_high: float
) -> ClippedLoss:
    """Return -min(ratio A, clip(ratio, 1 - low, 1 + high) A) of each token.

    Args:
        logprobs_BS: of the policy, with gradients.
        old_BS: of the policy when the batch arrived.
        advantages_BS: without gradients.
        clip_low: how far the ratio may fall.
        clip_high: how far it may rise.
    """
    ratio_BS = (logprobs_BS - old_BS).exp()
    free_BS = ratio_BS * advantages_BS
    held_BS = ratio_BS.clamp(1 - clip_low, 1 + clip_high) * advantages_BS
    return ClippedLoss(
        loss_BS=-torch.minimum(free_BS, held_BS),
        is_clipped_BS=(held_BS < free_BS).detach(),
        ratio_BS=ratio_BS.detach(),
    )


def clipped_value_loss(
    values_BS: Tensor, old_values_BS: Tensor, returns_BS: Tensor, clip_range: float
) -> Tensor:
    """Return half the larger squared error of the value and of the clipped value."""
    near_BS = old_values_BS + (values_BS - old_values_BS).clamp(-clip_range, clip_range)
    errors = (values_BS - returns_BS).square(), (near_BS - returns_BS).square()
    return 0.5 * torch.maximum(*errors)


def kl_k1(logprobs_BS: Tensor, reference_BS: Tensor) -> Tensor:
    """Return log policy - log reference: unbiased for tokens that the policy drew."""
    return logprobs_BS - reference_BS


def kl_k3(logprobs_BS: Tensor, reference_BS: Tensor) -> Tensor:
    """Return r - 1 - log r with r = reference / policy: never negative, less noisy than k1."""
    log_ratio_BS = reference_BS - logprobs_BS
    return log_ratio_BS.exp() - 1 - log_ratio_BS


def importance_weights(trainer_BS: Tensor, sampler_BS: Tensor, cap: float) -> Tensor:
    """Return min(trainer / sampler, cap) of each token, without gradients."""
    return (trainer_BS - sampler_BS).exp().clamp(max=cap).detach()
