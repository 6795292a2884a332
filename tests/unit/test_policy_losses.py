"""Losses of policy gradients, by hand."""

import math

import pytest
import torch

from speechalign.training.policy_losses import (
    clipped_policy_loss,
    clipped_value_loss,
    importance_weights,
    kl_k1,
    kl_k3,
)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "is_clipped"),
    [
        (1.0, 2.0, -2.0, False),
        (1.1, 2.0, -2.2, False),
        (1.5, 2.0, -2.56, True),  # held at 1.28
        (0.5, 2.0, -1.0, False),  # a good token may always come back
        (0.5, -2.0, 1.6, True),  # held at 0.8
        (1.5, -2.0, 3.0, False),
    ],
)
def test_the_clipped_loss_is_the_worse_of_both(
    ratio: float, advantage: float, loss: float, is_clipped: bool
):
    old = torch.tensor([[-1.0]])
    found = clipped_policy_loss(
        old + math.log(ratio), old, torch.tensor([[advantage]]), clip_low=0.2, clip_high=0.28
    )
    assert found.loss_BS.item() == pytest.approx(loss, abs=1e-6)
    assert found.is_clipped_BS.item() is is_clipped
    assert found.ratio_BS.item() == pytest.approx(ratio)


def test_a_clipped_token_has_no_gradient():
    logprobs = torch.tensor([[0.0, math.log(2.0)]], requires_grad=True)
    found = clipped_policy_loss(logprobs, torch.zeros(1, 2), torch.ones(1, 2), 0.2, 0.2)
    found.loss_BS.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[-1.0, 0.0]]


def test_the_value_loss_takes_the_larger_error():
    old, returns = torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 1.1]])
    values = torch.tensor([[1.9, 1.1]])  # 0.2 around the old: the first counts as 1.2
    losses = clipped_value_loss(values, old, returns, 0.2)
    assert losses.tolist()[0] == pytest.approx([0.5 * 0.8**2, 0.0], abs=1e-6)


def test_k1_and_k3():
    policy, reference = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert kl_k1(policy, reference).item() == pytest.approx(math.log(2))
    assert kl_k3(policy, reference).item() == pytest.approx(0.5 - 1 + math.log(2))


def test_k3_has_the_true_kl_as_its_mean():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    expected = (p * (p / q).log()).sum()
    torch.testing.assert_close((p * kl_k3(p.log(), q.log())).sum(), expected)


def test_importance_weights_are_capped_and_have_no_gradient():
    trainer = torch.tensor([0.0, 1.0], requires_grad=True)
    weights = importance_weights(trainer, torch.tensor([math.log(2.0), 0.0]), cap=2.0)
    assert weights.tolist() == pytest.approx([0.5, 2.0])
    assert not weights.requires_grad
