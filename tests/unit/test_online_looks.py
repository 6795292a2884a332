"""When an online training stops, which look is the best, and how long nobody worked, by hand."""

import json
import math
from dataclasses import asdict
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from speechalign.config.online_training import OnlineGuardsConfig
from speechalign.policy.answer_batch import AnswerBatch
from speechalign.training.engine import Engine
from speechalign.training.online_base import TrainedPolicy
from speechalign.training.online_looks import (
    Looks,
    idle_share,
    look_at,
    rewards_of_all,
    wer_of,
)
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
    return all_looks, [see(all_looks, 5 * i, look) for i, look in enumerate(looks)]


def see(looks: Looks, step: int, look: dict[str, float]) -> str | None:
    """Show a look at one answer, which has its reward."""
    return looks.see(step, look, [look["reward"]] if "reward" in look else [None], GUARDS)


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


@pytest.mark.parametrize(
    ("judged", "found"),
    [
        # 3 wrong of 12 words; the mean of the rates of two answers, 1/10 and 2/2, would be .55
        ({"judge_eval_word_errors": 1.5, "judge_eval_words": 6.0, "judge_eval_wer": 0.55}, 0.25),
        ({"judge_eval_word_errors": 0.0, "judge_eval_words": 6.0}, 0.0),
        ({"judge_eval_wer": 0.55}, 0.55),
        ({"judge_eval_words": 6.0, "judge_eval_wer": 0.55}, 0.55),
        ({"judge_eval_word_errors": 1.5, "judge_eval_words": 6.0, "judge_reward_wer": 0.9}, 0.25),
    ],
)
def test_the_wer_is_of_all_words_where_they_were_counted(judged: dict[str, float], found: float):
    assert wer_of(judged) == {"wer": pytest.approx(found)}


@pytest.mark.parametrize("judged", [{}, {"judge_reward_wer": 0.9}, {"judge_eval_words": 6.0}])
def test_without_an_independent_recogniser_there_is_no_wer(judged: dict[str, float]):
    assert wer_of(judged) == {}


@pytest.mark.parametrize(
    ("first", "last_allowed", "refused"),
    [
        (0.2, 0.3, 0.301),  # 1.5 times as much
        (0.0, 0.015, 0.0151),  # counts as .01
        (0.004, 0.015, 0.0151),
    ],
)
def test_a_wer_that_grows_is_refused_and_never_the_best(
    first: float, last_allowed: float, refused: float
):
    looks, said = seen(
        a_look(0.1, wer=first), a_look(0.2, wer=last_allowed), a_look(9.0, wer=refused)
    )
    assert said[:2] == [None, None]
    assert said[2] == (
        f"step 10: the held-out WER grew from {first:.1%} to {refused:.1%}, by more than "
        "guards.max_wer_growth 50%"
    )
    assert (looks.best_step, looks.best_reward) == (5, 0.2)


def test_the_wer_is_compared_with_the_first_also_after_a_restart():
    before = Looks()
    assert see(before, 0, a_look(wer=0.2)) is None
    assert see(before, 5, a_look(wer=0.29)) is None
    restored = Looks(**json.loads(json.dumps(asdict(before))))
    said = see(restored, 10, a_look(9.0, wer=0.4))
    assert said is not None
    assert "the held-out WER grew from 20.0% to 40.0%" in said


def test_a_wer_that_nobody_can_measure_any_more_is_refused():
    looks, said = seen(a_look(0.1, wer=0.2), a_look(9.0))
    assert said[1] is not None
    assert "the held-out WER, 20.0% at the first look, is measured of no answer any more" in said[1]
    assert looks.best_step == 0


def test_no_recogniser_no_guard_and_the_first_look_that_has_one_counts():
    _, said = seen(a_look(0.1), a_look(0.2), a_look(0.3, wer=0.2), a_look(0.4, wer=0.31))
    assert said[:3] == [None] * 3
    assert said[3] is not None


def test_null_takes_the_guard_of_the_wer_away():
    looks, guards = Looks(), GUARDS.model_copy(update={"max_wer_growth": None})
    for step, look in enumerate((a_look(0.1, wer=0.2), a_look(0.2, wer=0.9), a_look(0.3))):
        assert looks.see(step, look, [look["reward"]], guards) is None


def test_two_looks_are_compared_by_the_answers_that_both_have_a_reward_of():
    looks = Looks()
    easy, hard = [0.9] * 2, [0.3] * 2
    assert looks.see(0, a_look(0.6), [*easy, *hard], GUARDS) is None
    # the judge fails at a hard answer: the mean of the others is .7, and none of them is better
    assert looks.see(5, a_look(0.7), [*easy, 0.3, None], GUARDS) is None
    assert (looks.best_step, looks.best_reward) == (0, 0.6)
    assert looks.see(10, a_look(0.65), [0.9, 0.8, 0.5, None], GUARDS) is None
    assert (looks.best_step, looks.best_rewards) == (10, [0.9, 0.8, 0.5, None])
    restored = Looks(**json.loads(json.dumps(asdict(looks))))
    assert restored.see(15, a_look(0.9), [None, None, None, 0.9], GUARDS) is None
    assert restored.best_step == 10


def test_the_first_look_with_a_reward_is_the_best_so_far():
    looks, _ = seen({"stop_share": 1.0, "entropy": 2.0, "length": 99.0, "kl_k1": 0.0}, a_look(-3.0))
    assert (looks.best_step, looks.best_reward) == (5, -3.0)


def test_looks_while_the_policy_waits_for_its_critic_try_no_patience():
    looks = Looks(num_warmup_steps=20)
    same = a_look(0.5)
    assert [see(looks, step, same) for step in range(0, 31, 5)] == [None] * 7
    assert looks.num_since_best == 2  # those of steps 25 and 30
    assert see(looks, 35, same) is not None
    assert looks.best_step == 0


def test_the_rewards_of_all_ranks_have_places_of_their_own():
    def rollout(reward: float | None) -> Rollout:
        return Rollout(
            prompt_id="p", prompt_token_ids=(2,), token_ids=(8,), sampler_logprobs=(0.0,),
            reward=reward, is_truncated=False,
        )  # fmt: skip

    found = rewards_of_all([rollout(0.25), rollout(None), rollout(0.0)], torch.device("cpu"))
    assert found == [0.25, None, 0.0]


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
