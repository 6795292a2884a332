import math

import pytest
import torch
from pydantic import ValidationError

from speechalign.config.preference_training import DpoLossConfig, PreferenceTrainingConfig
from speechalign.training.losses import (
    PairLogprobs,
    dpo_loss,
    loss_of_an_unmoved_policy,
    pair_loss,
    reference_point,
)


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
    config = DpoLossConfig(variant="cdpo", beta=0.5, label_smoothing=0.1)
    expected = 0.9 * math.log1p(math.exp(-1.5)) + 0.1 * math.log1p(math.exp(1.5))
    assert dpo_loss(POLICY, REFERENCE, config).loss_B.item() == pytest.approx(expected)


def test_the_robust_loss_by_hand():
    config = DpoLossConfig(variant="robust", beta=0.5, label_smoothing=0.1)
    expected = (0.9 * math.log1p(math.exp(-1.5)) - 0.1 * math.log1p(math.exp(1.5))) / 0.8
    assert dpo_loss(POLICY, REFERENCE, config).loss_B.item() == pytest.approx(expected)


def test_the_kto_loss_by_hand():
    config = DpoLossConfig(variant="kto", beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    # the chosen answer gained 1 nat, the rejected lost 2; the reference point is 0.4
    good = 2 * (1 - 1 / (1 + math.exp(-0.5 * (1 - 0.4))))
    bad = 3 * (1 - 1 / (1 + math.exp(-0.5 * (0.4 + 2))))
    loss = dpo_loss(POLICY, REFERENCE, config, kl=0.4).loss_B.item()
    assert loss == pytest.approx((good + bad) / 2)
    unmoved = dpo_loss(POLICY, POLICY, config).loss_B.item()
    assert unmoved == pytest.approx(1.25) == loss_of_an_unmoved_policy(config)


def test_the_reference_point_is_a_mean_and_never_below_zero():
    assert reference_point(torch.tensor(3.0), torch.tensor(4.0)) == 0.75
    assert reference_point(torch.tensor(-3.0), torch.tensor(4.0)) == 0.0
    assert reference_point(torch.tensor(0.0), torch.tensor(0.0)) == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "kto", "logprobs": "length_normalised"}, "set logprobs: summed"),
        ({"desirable_weight": 2.0}, "are kto's"),
    ],
)
def test_settings_of_kto_that_would_be_ignored_are_refused(
    changes: dict[str, object], message: str
):
    with pytest.raises(ValidationError, match=message):
        DpoLossConfig.model_validate(changes)


def test_the_simpo_loss_by_hand_knows_no_reference():
    config = DpoLossConfig(
        variant="simpo", logprobs="length_normalised", beta=2.0, target_margin=0.3
    )
    # -2/2 - -6/4 = 0.5 nats a token: 2 * 0.5 - 0.3
    expected = math.log1p(math.exp(-0.7))
    assert dpo_loss(POLICY, REFERENCE, config).loss_B.item() == pytest.approx(expected)
    assert dpo_loss(POLICY, POLICY, config).loss_B.item() == pytest.approx(expected)
    assert loss_of_an_unmoved_policy(config) is None


def test_fine_tuning_on_the_chosen_is_its_loss_per_token_whatever_was_rejected():
    config = PreferenceTrainingConfig(method="sft")
    assert pair_loss(POLICY, REFERENCE, config).loss_B.item() == pytest.approx(1.0)
    other = logprobs(-2.0, -60.0)
    assert pair_loss(other, REFERENCE, config).loss_B.item() == pytest.approx(1.0)


def test_chain_of_hindsight_learns_both_sides():
    config = PreferenceTrainingConfig(method="coh")
    assert pair_loss(POLICY, REFERENCE, config).loss_B.item() == pytest.approx(1.0 + 1.5)


def test_dpo_is_dpo_by_the_method_too():
    config = PreferenceTrainingConfig(loss=DpoLossConfig(beta=0.5))
    assert torch.equal(
        pair_loss(POLICY, REFERENCE, config).loss_B,
        dpo_loss(POLICY, REFERENCE, config.loss).loss_B,
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"label_smoothing": 0.1}, "of cdpo and robust"),
        ({"variant": "robust"}, "need it above 0"),
        ({"target_margin": 0.1}, "is simpo's"),
        ({"variant": "simpo"}, "length_normalised"),
    ],
)
def test_a_setting_that_the_variant_would_ignore_is_refused(
    values: dict[str, object], message: str
):
    with pytest.raises(ValidationError, match=message):
        DpoLossConfig.model_validate(values)


def test_a_loss_that_the_method_would_ignore_is_refused():
    with pytest.raises(ValidationError, match="is of dpo; coh has nothing"):
        PreferenceTrainingConfig(method="coh", loss=DpoLossConfig(beta=0.2))


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
        DpoLossConfig(variant="cdpo", label_smoothing=0.2),
        DpoLossConfig(variant="robust", label_smoothing=0.2),
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
