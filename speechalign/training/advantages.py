"""From rewards to advantages, and what it costs to leave the reference. Pure.

group     Shao et al. 2024 (GRPO), section 4.1.2; without the division: Liu et al. 2025 (Dr. GRPO)
GAE       Schulman et al. 2016, eq. 16
whitening over all tokens of the batch, as in the code of Ziegler et al. 2019
control   Ziegler et al. 2019, section 2.2

Left out, and why:
    one deviation for the whole batch      prompts differ in what their rewards spread over
    a mean without the answer itself       (RLOO) the same but for a factor G / (G - 1)
    whitened rewards                       `whiten_advantages` takes the scale out after them
    a value after the last token           a cut answer is judged as it is: nothing follows it

Shapes: G answers of a prompt, A tokens of an answer, B answers, S positions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from speechalign.config.online_training import KlConfig

STD_FLOOR = 1e-6


def group_advantages(rewards_G: Tensor, *, divides_by_std: bool) -> Tensor | None:
    """Return how much better than the mean of its group each answer is.

    Nothing, if all are worth the same: such a group teaches nothing and is counted, not trained on.

    Args:
        rewards_G: of one prompt, the measured ones only.
        divides_by_std: by the sample standard deviation.
    """
    if len(rewards_G) < 2 or float(rewards_G.max() - rewards_G.min()) < STD_FLOOR:
        return None
    centred_G = rewards_G - rewards_G.mean()
    return centred_G / (rewards_G.std() + STD_FLOOR) if divides_by_std else centred_G


def rewards_per_token(
    terminal_B: Tensor, divergence_BS: Tensor, mask_BS: Tensor, coefficient: float
) -> Tensor:
    """Return reward_BS: the KL's cost at every token, the reward at the last one.

    Args:
        terminal_B: the reward of each answer.
        divergence_BS: log policy - log reference of the tokens.
        mask_BS: true on the answer, its stop token included; right-padded, no gaps.
        coefficient: of the KL.
    """
    reward_BS = -coefficient * divergence_BS * mask_BS
    last_BS = mask_BS & ~torch.nn.functional.pad(mask_BS, (0, 1))[:, 1:]
    return reward_BS + last_BS * terminal_B[:, None]


def gae(
    rewards_BS: Tensor, values_BS: Tensor, mask_BS: Tensor, discount: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Return (advantage_BS, return_BS), zero off the answers.

    Args:
        rewards_BS: of each token.
        values_BS: expected return just before each token.
        mask_BS: true on the answer.
        discount: of a token's future.
        lam: GAE's lambda; 1 is Monte Carlo, 0 one step.
    """
    advantages_BS = torch.zeros_like(rewards_BS)
    following_B = torch.zeros_like(rewards_BS[:, 0])
    next_value_B = torch.zeros_like(following_B)
    for position in reversed(range(rewards_BS.shape[1])):
        on_B = mask_BS[:, position]
        delta_B = rewards_BS[:, position] + discount * next_value_B - values_BS[:, position]
        following_B = torch.where(on_B, delta_B + discount * lam * following_B, 0.0)
        next_value_B = torch.where(on_B, values_BS[:, position], 0.0)
        advantages_BS[:, position] = following_B
    return advantages_BS, (advantages_BS + values_BS) * mask_BS


def whitening(values: Sequence[Tensor]) -> Tensor:
    """Return (sum, sum of squares, count) of all values; add them up over ranks."""
    all_A = torch.cat(list(values))
    return torch.stack([all_A.sum(), all_A.square().sum(), all_A.new_tensor(float(len(all_A)))])


def whitened(values_A: Tensor, sums: Tensor) -> Tensor:
    """Return the values with the mean and variance of `sums` taken out."""
    total, squares, count = sums
    mean = total / count
    variance = (squares / count - mean.square()).clamp(min=0)
    return (values_A - mean) / (variance.sqrt() + STD_FLOOR)


class KlController:
    """The coefficient of the KL, step after step."""

    def __init__(self, config: KlConfig) -> None:
        self._config = config
        self.coefficient = config.coefficient

    def see(self, kl: float) -> None:
        """Move an adaptive coefficient towards the target; a fixed one stays."""
        if self._config.controller == "fixed":
            return
        error = min(max(kl / self._config.target - 1, -0.2), 0.2)
        self.coefficient *= 1 + error / self._config.horizon_steps
