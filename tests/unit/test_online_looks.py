"""When an online training stops, which look is the best, and how long nobody worked, by hand."""

import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from speechalign.config.online_training import OnlineGuardsConfig
from speechalign.policy.answer_batch import AnswerBatch
from speechalign.training.engine import Engine
from speechalign.training.online_base import TrainedPolicy
from speechalign.training.online_looks import Looks, idle_share, look_at
from speechalign.training.rollouts import Rollout

GUARDS = OnlineGuardsConfig(
    max_kl=0.5, min_entropy_share=0.25, max_length_growth=0.5, min_stop_share=0.5, patience=3
)


def a_look(reward: float = 0.0, **changes: float) -> dict[str, float]:
    healthy = {"stop_share": 1.0, "entropy": 2.0, "length": 100.0, "kl_k1": 0.1}
    return {"reward": reward} | healthy | changes


def seen(*looks: dict[str, float]) -> tuple[Looks, list[str | None]]:
    """Return what is remembered of looks, five steps apart, and what was said to each."""
    all_looks = Looks()
    return all_looks, [all_looks.see(5 * i, look, GUARDS) for i, look in enumerate(looks)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"kl_k1": 0.51},
            "step 5: the policy is 0.510 nats a token from the reference, more than guards.max_kl "
            "0.5",
        ),
        (
            {"entropy": 0.49},
            "step 5: the entropy fell from 2.000 to 0.490 nats a token, below "
            "guards.min_entropy_share 0.25",
        ),
        (
            {"length": 151.0},
            "step 5: the held-out answers grew from 100.0 to 151.0 tokens, by more than "
            "guards.max_length_growth 50%",
        ),
        (
            {"stop_share": 0.49},
            "step 5: only 49% of the answers end by themselves, guards.min_stop_share is 50%",
        ),
    ],
    ids=["kl", "entropy", "length", "stop share"],
)
def test_a_guard_says_why_it_stops_and_a_collapsed_look_is_never_the_best(
    change: dict[str, float], message: str
):
    looks, said = seen(a_look(0.1), a_look(9.0, **change))
    assert said == [None, message]
    assert (looks.best_step, looks.best_reward, looks.last_step) == (0, 0.1, 5)


@pytest.mark.parametrize(
    "change", [{"kl_k1": 0.5}, {"entropy": 0.5}, {"length": 150.0}, {"stop_share": 0.5}]
)
def test_a_look_at_the_limit_may_be_the_best(change: dict[str, float]):
    looks, said = seen(a_look(0.1), a_look(0.2, **change))
    assert said == [None, None]
    assert (looks.best_step, looks.best_reward) == (5, 0.2)


def test_a_start_that_collapsed_leaves_nothing_worth_more_than_itself():
    looks, said = seen(a_look(9.0, stop_share=0.1))
    assert said[0] is not None
    assert (looks.best_step, looks.best_reward) == (0, -math.inf)


def test_the_entropy_is_compared_with_the_first_and_not_with_the_look_before():
    _, said = seen(*(a_look(i, entropy=entropy) for i, entropy in enumerate((2.0, 0.8, 0.4))))
    assert said[:2] == [None, None]
    assert said[2] is not None
    assert "the entropy fell from 2.000 to 0.400" in said[2]


def test_the_length_is_compared_with_the_first_and_not_with_the_look_before():
    _, said = seen(*(a_look(i, length=length) for i, length in enumerate((100.0, 140.0, 160.0))))
    assert said[:2] == [None, None]
    assert said[2] is not None
    assert "answers grew from 100.0 to 160.0 tokens" in said[2]


def test_patience_ends_after_three_looks_without_a_better_reward():
    rewards = (0.1, 0.3, 0.3, 0.2, 0.1)
    looks, said = seen(*map(a_look, rewards))
    assert said[:4] == [None] * 4
    assert said[4] == "step 20: the held-out reward was not above 0.3000 of step 5 for 3 looks"
    assert (looks.best_step, looks.best_reward) == (5, 0.3)


def test_a_better_reward_renews_the_patience():
    rewards = (0.3, 0.2, 0.1, 0.4, 0.3, 0.2)
    looks, said = seen(*map(a_look, rewards))
    assert said == [None] * 6
    assert (looks.best_step, looks.num_since_best) == (15, 2)


def test_a_look_at_which_nothing_was_judged_is_not_a_better_one():
    unjudged = a_look()
    del unjudged["reward"]
    looks, said = seen(a_look(-1.0), unjudged)
    assert said == [None, None]
    assert (looks.best_step, looks.best_reward, looks.num_since_best) == (0, -1.0, 1)


class CountingReference(TrainedPolicy):
    """Says -1 of every token and remembers how many answers it was asked about at a time."""

    def __init__(self) -> None:
        engine: Any = type("OnCpu", (), {"device": torch.device("cpu")})
        super().__init__(cast(Engine, engine), torch.nn.Identity(), 1.0)
        self.asked: list[int] = []

    def reference(self, batch: AnswerBatch) -> tuple[Tensor, Tensor]:
        self.asked.append(len(batch.input_ids_BS))
        return -1.0 * batch.answer_mask_BS, torch.zeros(batch.input_ids_BS.shape)


def test_a_look_takes_as_many_answers_at_a_time_as_fit_into_the_memory():
    answers = [
        Rollout(
            prompt_id=f"p{index}",
            prompt_token_ids=(2, 3),
            token_ids=(9,) * (1 + index),
            sampler_logprobs=(-0.5,) * (1 + index),
            reward=None if index else 3.0,
            is_truncated=index == 4,
        )
        for index in range(5)
    ]
    for answers_per_forward, asked in ((2, [2, 2, 1]), (5, [5])):
        policy = CountingReference()
        found = look_at(answers, policy, answers_per_forward)
        assert policy.asked == asked
        assert found == pytest.approx(
            {
                "reward": 3.0,
                "stop_share": 0.8,
                "length": 3.0,
                "entropy": 0.5,
                "kl_k1": 0.5,
                "kl_k3": math.exp(-0.5) - 1 + 0.5,
            }
        )


def test_a_step_of_training_is_guarded_by_its_stop_share_alone():
    looks = Looks()
    assert looks.guard_step({"stop_share": 0.5}, 3, GUARDS) is None
    assert looks.guard_step({"stop_share": 0.25}, 3, GUARDS) == (
        "step 3: only 25% of the answers end by themselves, guards.min_stop_share is 50%"
    )


@pytest.mark.parametrize(
    ("busy", "share"),
    [
        ([], 1.0),
        ([(0, 10)], 0.0),
        ([(2, 4), (1, 3), (8, 20)], 0.5),  # overlapping, in any order, longer than what counts
        ([(1, 9), (2, 3), (4, 5)], 0.2),  # one inside of another
        ([(-5, 1), (-9, -7), (12, 15)], 0.9),  # partly or wholly outside
    ],
)
def test_idle_is_when_nobody_is_busy(busy: list[tuple[float, float]], share: float):
    assert idle_share(busy, 0, 10) == pytest.approx(share)


def test_no_time_at_all_is_no_division_by_zero():
    assert idle_share([(1, 2)], 5, 5) == 1.0
