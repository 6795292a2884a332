"""Rewards to advantages, by hand."""

import pytest
import torch

from speechalign.config.online_training import KlConfig
from speechalign.training.advantages import (
    KlController,
    gae,
    group_advantages,
    rewards_per_token,
    whitened,
    whitening,
)


def test_a_group_is_centred_and_divided_by_its_sample_deviation():
    advantages = group_advantages(torch.tensor([1.0, 2.0, 3.0]), divides_by_std=True)
    assert advantages is not None
    assert advantages.tolist() == pytest.approx([-1.0, 0.0, 1.0], abs=1e-5)


def test_without_the_deviation_a_group_is_only_centred():
    advantages = group_advantages(torch.tensor([1.0, 5.0]), divides_by_std=False)
    assert advantages is not None
    assert advantages.tolist() == [-2.0, 2.0]


@pytest.mark.parametrize("rewards", [[2.0, 2.0, 2.0], [1.0], []])
def test_a_group_without_variance_teaches_nothing(rewards: list[float]):
    assert group_advantages(torch.tensor(rewards), divides_by_std=True) is None


def test_the_reward_is_at_the_last_token_and_the_kl_at_every_one():
    mask = torch.tensor([[False, True, True, False], [False, False, True, True]])
    divergence = torch.tensor([[9.0, 1.0, 2.0, 9.0], [9.0, 9.0, -1.0, 0.5]])
    rewards = rewards_per_token(torch.tensor([10.0, 20.0]), divergence, mask, 0.1)
    expected = torch.tensor([[0.0, -0.1, 9.8, 0.0], [0.0, 0.0, 0.1, 19.95]])
    torch.testing.assert_close(rewards, expected)


def test_gae_by_hand():
    mask = torch.tensor([[False, True, True, False]])
    rewards = torch.tensor([[0.0, 1.0, 2.0, 0.0]])
    values = torch.tensor([[7.0, 0.5, 0.25, 7.0]])  # those off the answer must not count
    advantages, returns = gae(rewards, values, mask, 0.9, 0.5)
    last = 2.0 - 0.25
    first = 1.0 + 0.9 * 0.25 - 0.5 + 0.9 * 0.5 * last
    torch.testing.assert_close(advantages, torch.tensor([[0.0, first, last, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[0.0, first + 0.5, last + 0.25, 0.0]]))


def test_gae_with_lambda_one_is_the_return_less_the_value():
    mask = torch.ones(1, 3, dtype=torch.bool)
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.5, 0.25, 1.0]])
    advantages, returns = gae(rewards, values, mask, 1.0, 1.0)
    torch.testing.assert_close(returns, torch.tensor([[7.0, 6.0, 4.0]]))
    torch.testing.assert_close(advantages, torch.tensor([[6.5, 5.75, 3.0]]))


def test_padding_does_not_change_advantages():
    mask = torch.tensor([[False, True, True]])
    rewards, values = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.0, 0.5, 0.25]])
    plain, _ = gae(rewards, values, mask, 0.9, 0.5)
    pad = torch.nn.functional.pad
    wide_rewards, wide_values = pad(rewards, (0, 4), value=3), pad(values, (0, 4), value=3)
    padded, _ = gae(wide_rewards, wide_values, pad(mask, (0, 4)), 0.9, 0.5)
    torch.testing.assert_close(padded[:, :3], plain)
    assert not padded[:, 3:].any()


def test_whitening_is_over_all_tokens_of_all_ranks():
    ranks = [torch.tensor([1.0]), torch.tensor([3.0, 5.0])]
    sums = sum((whitening([value]) for value in ranks), torch.zeros(3))
    assert sums.tolist() == [9.0, 35.0, 3.0]
    assert whitening(ranks).tolist() == [9.0, 35.0, 3.0]
    deviation = (35 / 3 - 9) ** 0.5
    together = [whitened(value, sums) for value in ranks]
    assert together[0].tolist() == pytest.approx([-2 / deviation], abs=1e-5)
    assert together[1].tolist() == pytest.approx([0.0, 2 / deviation], abs=1e-5)


def test_an_adaptive_coefficient_moves_towards_its_target():
    config = KlConfig(coefficient=0.1, controller="adaptive", target=0.02, horizon_steps=10)
    control = KlController(config)
    control.see(0.022)  # a tenth too much
    assert control.coefficient == pytest.approx(0.1 * 1.01)
    control.see(0.2)  # nine times too much, clipped to a fifth
    assert control.coefficient == pytest.approx(0.1 * 1.01 * 1.02)
    control.see(0.0)
    assert control.coefficient == pytest.approx(0.1 * 1.01 * 1.02 * 0.98)


def test_a_fixed_coefficient_stays():
    control = KlController(KlConfig(coefficient=0.1))
    control.see(5.0)
    assert control.coefficient == 0.1
