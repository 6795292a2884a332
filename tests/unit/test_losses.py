import math

import pytest
import torch

from speechalign.config.dpo import DpoLossConfig
from speechalign.training.losses import PairLogprobs, dpo_loss, loss_of_an_unmoved_policy


def logprobs(
    chosen: float, rejected: float, chosen_tokens: int = 2, rejected_tokens: int = 4
) -> PairLogprobs:
    return PairLogprobs(
        chosen_B=torch.tensor([chosen]),
        rejected_B=torch.tensor([rejected]),
        chosen_tokens_B=torch.tensor([chosen_tokens]),
        rejected_tokens_B=torch.tensor([rejected_tokens]),
    )


POLICY, REFERENCE = logprobs(-2.0, -6.0), logprobs(-3.0, -4.0)
# the policy prefers by 4, the reference by 1: a gap of 3


def test_the_sigmoid_loss_by_hand():
    output = dpo_loss(POLICY, REFERENCE, DpoLossConfig(beta=0.5))
    assert output.loss_B.item() == pytest.approx(math.log1p(math.exp(-1.5)))
    assert output.chosen_reward_B.item() == pytest.approx(0.5)
    assert output.rejected_reward_B.item() == pytest.approx(-1.0)
    assert output.margin_B.item() == pytest.approx(1.5)


def test_the_conservative_loss_by_hand():
    output = dpo_loss(POLICY, REFERENCE, DpoLossConfig(beta=0.5, label_smoothing=0.1))
    expected = 0.9 * math.log1p(math.exp(-1.5)) + 0.1 * math.log1p(math.exp(1.5))
    assert output.loss_B.item() == pytest.approx(expected)


def test_the_ipo_loss_by_hand():
    output = dpo_loss(POLICY, REFERENCE, DpoLossConfig(beta=0.25, variant="ipo"))
    assert output.loss_B.item() == pytest.approx((3.0 - 2.0) ** 2)


def test_length_normalisation_divides_each_answer_by_its_own_tokens():
    config = DpoLossConfig(beta=1.0, logprobs="length_normalised")
    # policy -2/2 - -6/4 = 0.5; reference -3/2 - -4/4 = -0.5
    assert dpo_loss(POLICY, REFERENCE, config).margin_B.item() == pytest.approx(1.0)


def test_the_anchor_is_the_loss_per_token_of_the_chosen_answer():
    bare = dpo_loss(POLICY, REFERENCE, DpoLossConfig(beta=0.5))
    anchored = dpo_loss(POLICY, REFERENCE, DpoLossConfig(beta=0.5, sft_weight=0.2))
    assert anchored.anchor_B.item() == pytest.approx(1.0)
    assert (anchored.loss_B - bare.loss_B).item() == pytest.approx(0.2)


@pytest.mark.parametrize(
    "config",
    [
        DpoLossConfig(),
        DpoLossConfig(label_smoothing=0.2),
        DpoLossConfig(variant="ipo", beta=0.5),
        DpoLossConfig(logprobs="length_normalised"),
    ],
)
def test_an_unmoved_policy_has_the_loss_of_a_coin(config: DpoLossConfig):
    loss = dpo_loss(REFERENCE, REFERENCE, config).loss_B.item()
    assert loss == pytest.approx(loss_of_an_unmoved_policy(config))


def test_the_loss_of_a_coin_is_ln_2():
    assert loss_of_an_unmoved_policy(DpoLossConfig()) == pytest.approx(math.log(2))


def test_the_gradient_raises_the_chosen_and_lowers_the_rejected_answer():
    chosen_B = torch.tensor([-3.0], requires_grad=True)
    rejected_B = torch.tensor([-4.0], requires_grad=True)
    policy = PairLogprobs(
        chosen_B=chosen_B,
        rejected_B=rejected_B,
        chosen_tokens_B=torch.tensor([2]),
        rejected_tokens_B=torch.tensor([4]),
    )
    dpo_loss(policy, REFERENCE, DpoLossConfig(beta=0.5)).loss_B.sum().backward()
    assert chosen_B.grad is not None
    assert rejected_B.grad is not None
    assert chosen_B.grad.item() == pytest.approx(-0.25)  # -beta * sigmoid(0)
    assert rejected_B.grad.item() == pytest.approx(0.25)
