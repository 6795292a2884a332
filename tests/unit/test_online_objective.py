"""The loss that PPO and GRPO minimise, by hand: two answers of one and of three tokens.

The log-probs of the policy are given, so a loss is a sum of four numbers. The answer of one token
is worth 3, the other 1: without a division by the deviation their advantages are 1 and -1. Some
tests have a third answer, of two tokens, worth 8 and cut off; online DPO is with them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from speechalign.policy.answer_batch import AnswerBatch
from speechalign.training import policy_gradient
from speechalign.training.critic import Critic, ValueTargets
from speechalign.training.engine import Engine
from speechalign.training.online_base import Learner, OnlineTask, TrainedPolicy
from speechalign.training.online_dpo import OnlineDpo
from speechalign.training.policy_gradient import PolicyGradient
from speechalign.training.rollouts import Rollout
from speechalign.training.running_means import RunningMeans
from tests.online_toy import a_config

LN2 = math.log(2.0)
SHORT, LONG, CUT = (9,), (10, 11, 12), (13, 14)
ZERO = dict.fromkeys((*SHORT, *LONG, *CUT), 0.0)


class Updates:
    """In place of an engine: remembers what it was to minimise."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.losses: list[float] = []

    def update(self, loss: Tensor) -> None:
        self.losses.append(float(loss))


class GivenPolicy(TrainedPolicy):
    """Log-probs of tokens as they are now, as they were when the answers arrived (`old`), and the
    reference's."""

    def __init__(
        self, engine: Updates, now: Mapping[int, float], old: Mapping[int, float],
        reference: Mapping[int, float],
    ) -> None:  # fmt: skip
        super().__init__(cast(Engine, engine), torch.nn.Identity(), 1.0)
        self._now, self._old, self._given = now, old, reference

    def forward(self, batch: AnswerBatch) -> tuple[Tensor, Tensor]:
        return _looked_up(self._now if torch.is_grad_enabled() else self._old, batch)

    def reference(self, batch: AnswerBatch) -> tuple[Tensor, Tensor]:
        return _looked_up(self._given, batch)


class Silent(Critic):
    """Expects nothing of any answer."""

    def __init__(self) -> None:
        self.expected: list[float] = []

    def expect(self, reward: Tensor) -> None:
        self.expected.append(float(reward))

    def values(self, batch: AnswerBatch) -> Tensor:
        return torch.zeros(batch.input_ids_BS.shape)

    def update(
        self, batch: AnswerBatch, targets: ValueTargets | None, scale: Tensor, means: RunningMeans
    ) -> None:
        pass


def _looked_up(logprobs: Mapping[int, float], batch: AnswerBatch) -> tuple[Tensor, Tensor]:
    rows = [[logprobs.get(token, 0.0) for token in row] for row in batch.input_ids_BS.tolist()]
    return torch.tensor(rows) * batch.answer_mask_BS, torch.zeros(batch.input_ids_BS.shape)


def an_answer(
    tokens: Sequence[int], reward: float | None, sampled: Mapping[int, float] = ZERO
) -> Rollout:
    return Rollout(
        prompt_id="p",
        prompt_token_ids=(2, 3),
        token_ids=tuple(tokens),
        sampler_logprobs=tuple(sampled[token] for token in tokens),
        reward=reward,
        is_truncated=False,
    )


def a_cut_answer(reward: float) -> Rollout:
    return replace(an_answer(CUT, reward), is_truncated=True)


def a_task(method: str, **changes: Any) -> OnlineTask:
    """Return the task of which losses are as simple as they can be."""
    plain: dict[str, Any] = {
        "grpo": {"grpo": {"divides_by_std": False}},
        "ppo": {"ppo": {"gae_lambda": 1.0, "whiten_advantages": False}},
        "online_dpo": {"online_dpo": {"loss": {"beta": 1.0}}},
    }
    values = plain[method] | {"prompts_per_step": 1} | changes
    values[method] = plain[method][method] | values[method]
    return OnlineTask(config=a_config(method, **values), temperature=1.0, samples_per_prompt=2)


def losses(
    method: str,
    *,
    now: Mapping[int, float] = ZERO,
    old: Mapping[int, float] = ZERO,
    reference: Mapping[int, float] = ZERO,
    sampled: Mapping[int, float] = ZERO,
    **changes: Any,
) -> list[float]:
    """Return what each update of a step minimises."""
    updates = Updates()
    policy = GivenPolicy(updates, now, old, reference)
    critic = Silent() if method == "ppo" else None
    learner = PolicyGradient(a_task(method, **changes), policy, critic)
    learner.learn([an_answer(SHORT, 3.0, sampled), an_answer(LONG, 1.0, sampled)], 0)
    return updates.losses


STALE = dict.fromkeys(SHORT, -2 * LN2) | dict.fromkeys(LONG, LN2)
"""What the sampler said where the policy says 0: tokens weigh 4, or the cap of 2, and 1/2."""


@pytest.mark.parametrize(
    ("normalised_over", "loss"),
    [
        ("tokens", (2 * -1 + 3 * 0.5) / 4),
        ("sequences", (2 * -1 + (3 * 0.5) / 3) / 2),
    ],
)
def test_every_token_counts_the_same_or_every_answer_does(normalised_over: str, loss: float):
    grpo = {"normalised_over": normalised_over}
    assert losses("grpo", grpo=grpo, sampled=STALE, max_staleness=1) == pytest.approx([loss])


@pytest.mark.parametrize(("coefficient", "added"), [(0.0, 0.0), (0.2, 0.2), (0.4, 0.4)])
def test_grpo_pays_k3_times_its_coefficient_in_the_loss(coefficient: float, added: float):
    far = ZERO | dict.fromkeys(LONG, LN2)  # k3 = 2 - 1 - ln 2 at three of four tokens
    found = losses("grpo", reference=far, kl={"coefficient": coefficient})
    assert found == pytest.approx([0.5 + added * 3 * (1 - LN2) / 4])


def test_grpo_pays_with_the_coefficient_that_the_controller_reached():
    far = ZERO | dict.fromkeys(LONG, LN2)
    kl = {"coefficient": 0.2, "controller": "adaptive", "horizon_steps": 1}
    updates = Updates()
    learner = PolicyGradient(a_task("grpo", kl=kl), GivenPolicy(updates, ZERO, ZERO, far), None)
    for step in range(2):
        learner.learn([an_answer(SHORT, 3.0), an_answer(LONG, 1.0)], step)
    k3 = 3 * (1 - LN2) / 4
    assert updates.losses == pytest.approx([0.5 + 0.2 * k3, 0.5 + 0.2 * 0.8 * k3])  # k1 is below


@pytest.mark.parametrize(
    ("cap", "loss"),
    [
        (2.0, (2 * -1 + 3 * 0.5) / 4),
        (3.0, (3 * -1 + 3 * 0.5) / 4),
        (9.0, (4 * -1 + 3 * 0.5) / 4),
    ],
)
def test_a_stale_token_weighs_trainer_over_sampler_up_to_the_cap(cap: float, loss: float):
    found = losses("grpo", sampled=STALE, max_staleness=1, importance_cap=cap)
    assert found == pytest.approx([loss])
    assert losses("grpo", sampled=STALE, max_staleness=0) == pytest.approx([0.5])  # only seen


def test_the_kl_cost_is_not_weighted_by_importance():
    far = ZERO | dict.fromkeys(LONG, LN2)
    found = losses("grpo", sampled=STALE, reference=far, max_staleness=1, kl={"coefficient": 0.2})
    assert found == pytest.approx([-0.125 + 0.2 * 3 * (1 - LN2) / 4])


MOVED = dict.fromkeys(SHORT, LN2) | dict.fromkeys(LONG, -LN2)
"""Both answers went where their advantage says, by a factor of 2."""


@pytest.mark.parametrize(
    ("low", "high", "loss"),
    [
        (0.1, 0.3, (-1.3 + 3 * 0.9) / 4),
        (0.1, 0.4, (-1.4 + 3 * 0.9) / 4),
        (0.3, 0.4, (-1.4 + 3 * 0.7) / 4),
    ],
)
def test_grpo_clips_falls_by_clip_low_and_rises_by_clip_high(low: float, high: float, loss: float):
    grpo = {"clip_low": low, "clip_high": high}
    found = losses("grpo", now=MOVED, grpo=grpo, num_epochs=2)  # one update has nothing to clip
    assert found == pytest.approx([loss, loss])


@pytest.mark.parametrize(
    ("coefficient", "loss"),
    [
        (0.0, -(3 + 3 * 1) / 4),
        # k1 is ln 2 a token of the long answer; what follows a token is what it is charged for
        (0.1, -(3 + 3 * 1 - (3 + 2 + 1) * 0.1 * LN2) / 4),
        (0.2, -(3 + 3 * 1 - (3 + 2 + 1) * 0.2 * LN2) / 4),
    ],
)
def test_ppo_pays_k1_times_its_coefficient_in_the_rewards(coefficient: float, loss: float):
    near = ZERO | dict.fromkeys(LONG, -LN2)
    found = losses("ppo", reference=near, kl={"coefficient": coefficient})
    assert found == pytest.approx([loss])


@pytest.mark.parametrize(
    ("clip_range", "loss"), [(0.1, -(1.1 * 3 + 3 * 0.5) / 4), (0.3, -(1.3 * 3 + 3 * 0.5) / 4)]
)
def test_ppo_clips_both_sides_by_one_range(clip_range: float, loss: float):
    found = losses("ppo", now=MOVED, ppo={"clip_range": clip_range})
    assert found == pytest.approx([loss])


def test_whitened_advantages_have_mean_0_and_variance_1_over_tokens():
    now = dict.fromkeys(SHORT, 0.0) | dict.fromkeys(LONG, -LN2)
    ppo = {"clip_range": 0.9, "whiten_advantages": True}
    # advantages 3, 1, 1, 1: mean 1.5, deviation sqrt(0.75); the ratios are 1 and 1/2
    expected = -(1.5 - 3 * 0.5 / 2) / math.sqrt(0.75) / 4
    assert losses("ppo", now=now, ppo=ppo) == pytest.approx([expected], rel=1e-5)


def test_a_rank_without_a_usable_answer_sends_what_the_others_send(
    monkeypatch: pytest.MonkeyPatch,
):
    sent: list[tuple[torch.dtype, torch.Size]] = []

    def with_another_rank(value: Tensor) -> Tensor:
        sent.append((value.dtype, value.shape))
        return value.detach() + 1

    monkeypatch.setattr(policy_gradient, "global_sum", with_another_rank)
    task = a_task("ppo", ppo={"whiten_advantages": True})
    usable = [an_answer(SHORT, 3.0), an_answer(LONG, 1.0)]
    seen: list[Any] = []
    for rollouts in (usable, [replace(rollout, reward=None) for rollout in usable]):
        sent.clear()
        updates = Updates()
        policy = GivenPolicy(updates, ZERO, ZERO, ZERO)
        PolicyGradient(task, policy, Silent()).learn(rollouts, 0)
        seen.append((list(sent), len(updates.losses)))
    assert seen[0] == seen[1]
    assert len(seen[0][0]) == 4  # mean reward, whitening, count of tokens, loss


@pytest.mark.parametrize(
    ("truncated", "grpo", "loss"),
    [
        # the mean is 4 in any case: advantages -1, -3 and, of the cut answer, 4
        ("masked", {}, (1 + 3 * 3) / 4),
        ("masked", {"normalised_over": "sequences"}, (1 + 3) / 2),
        ("masked", {"divides_by_std": True}, (1 + 3 * 3) / 4 / math.sqrt(13)),
        ("kept", {}, (1 + 3 * 3 - 2 * 4) / 6),
    ],
)
def test_grpo_compares_with_a_cut_answer_that_has_no_loss(
    truncated: str, grpo: dict[str, Any], loss: float
):
    updates = Updates()
    policy = GivenPolicy(updates, ZERO, ZERO, ZERO)
    learner = PolicyGradient(a_task("grpo", truncated=truncated, grpo=grpo), policy, None)
    learner.learn([an_answer(SHORT, 3.0), a_cut_answer(8.0), an_answer(LONG, 1.0)], 0)
    assert updates.losses == pytest.approx([loss])


@pytest.mark.parametrize(
    ("truncated", "loss", "expected"),
    [("masked", -(3 + 3 * 1) / 4, 2.0), ("kept", -(3 + 3 * 1 + 2 * 8) / 6, 4.0)],
)
def test_ppo_leaves_a_masked_answer_out_altogether(truncated: str, loss: float, expected: float):
    updates, critic = Updates(), Silent()
    policy = GivenPolicy(updates, ZERO, ZERO, ZERO)
    learner = PolicyGradient(a_task("ppo", truncated=truncated), policy, critic)
    learner.learn([an_answer(SHORT, 3.0), a_cut_answer(8.0), an_answer(LONG, 1.0)], 0)
    assert updates.losses == pytest.approx([loss])
    assert critic.expected == [expected]


@pytest.mark.parametrize(
    ("truncated", "loss"),
    [
        ("masked", math.log(1.5)),  # the short against the long one, by ln 2 more than before
        ("kept", LN2),  # the cut against the long one, neither of which has moved
    ],
)
def test_online_dpo_pairs_no_masked_answer(truncated: str, loss: float):
    updates = Updates()
    policy = GivenPolicy(updates, dict.fromkeys(SHORT, LN2), ZERO, ZERO)
    learner = OnlineDpo(a_task("online_dpo", truncated=truncated), policy)
    learner.learn([an_answer(SHORT, 3.0), a_cut_answer(8.0), an_answer(LONG, 1.0)], 0)
    assert updates.losses == pytest.approx([loss])


@pytest.mark.parametrize("method", ["grpo", "online_dpo"])
def test_a_group_that_teaches_nothing_is_counted_whatever_the_reason(method: str):
    groups = [
        [an_answer(SHORT, 3.0), an_answer(LONG, 1.0)],
        [an_answer(SHORT, 3.0), an_answer(LONG, 3.0)],
        [an_answer(SHORT, 3.0), an_answer(LONG, None)],
        [an_answer(SHORT, None), an_answer(LONG, None)],
        [a_cut_answer(3.0), a_cut_answer(1.0)],
    ]
    rollouts = [
        replace(answer, prompt_id=f"p{number}")
        for number, group in enumerate(groups)
        for answer in group
    ]
    task, policy = a_task(method, prompts_per_step=5), GivenPolicy(Updates(), ZERO, ZERO, ZERO)
    learner: Learner = (
        OnlineDpo(task, policy) if method == "online_dpo" else PolicyGradient(task, policy, None)
    )
    counted = "tied_groups" if method == "online_dpo" else "zero_variance_groups"
    assert learner.learn(rollouts, 0)[counted] == pytest.approx(4 / 5)
