"""Whether the online methods find what is rewarded, and what they leave out."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from speechalign.training.online_base import OnlineTask
from speechalign.training.online_dpo import best_and_worst
from speechalign.training.rollouts import Rollout
from tests.online_toy import PROMPTS, RIGHT, Toy, a_config, a_policy_folder, a_process_group

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with a_process_group():
        yield a_policy_folder(tmp_path_factory.mktemp("toy") / "policy")


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("grpo", {}),
        ("grpo", {"grpo": {"divides_by_std": False, "normalised_over": "sequences"}}),
        ("grpo", {"num_epochs": 2, "num_minibatches": 2, "kl": {"coefficient": 0.001}}),
        ("ppo", {"num_epochs": 2, "kl": {"coefficient": 0.001}}),
        ("online_dpo", {}),
    ],
)
def test_the_rewarded_answer_is_found(folder: Path, method: str, changes: dict[str, Any]):
    toy = Toy(folder, a_config(method, **changes), samples_per_prompt=32)
    before = toy.share_of_right()
    for step in range(60):
        toy.learner.learn(toy.answers(step, list(PROMPTS)), step)
    assert before < 0.05
    assert toy.share_of_right() > 0.9


def an_answer(reward: float | None, token: int = RIGHT, *, is_truncated: bool = False) -> Rollout:
    return Rollout(
        prompt_id="p0",
        prompt_token_ids=PROMPTS["p0"],
        token_ids=(token,),
        sampler_logprobs=(-3.0,),
        reward=reward,
        is_truncated=is_truncated,
    )


def weights(toy: Toy) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in toy.engine.unwrapped.parameters()]


@pytest.mark.parametrize("method", ["grpo", "online_dpo"])
def test_equal_rewards_move_nothing_and_are_counted(folder: Path, method: str):
    toy = Toy(folder, a_config(method))
    before = weights(toy)
    values = toy.learner.learn([an_answer(1.0), an_answer(1.0, 9)], 0)
    counted = "tied_groups" if method == "online_dpo" else "zero_variance_groups"
    assert values[counted] == 1.0
    assert all(map(torch.equal, before, weights(toy)))


def test_a_missing_reward_is_no_zero(folder: Path):
    toy = Toy(folder, a_config("grpo"))
    before = weights(toy)
    toy.learner.learn([an_answer(1.0), an_answer(None, 9), an_answer(1.0, 10)], 0)
    assert all(map(torch.equal, before, weights(toy)))


def test_truncated_answers_are_masked_or_kept(folder: Path):
    cut = an_answer(1.0, is_truncated=True)
    for rule, expected in (("masked", False), ("kept", True)):
        config = a_config("grpo", truncated=rule)
        task = OnlineTask(config=config, temperature=1.0, samples_per_prompt=2)
        assert task.can_learn_from(cut) is expected


def test_the_critic_warms_up_before_the_policy_moves(folder: Path):
    toy = Toy(folder, a_config("ppo", ppo={"critic_warmup_steps": 1}))
    before = weights(toy)
    first = toy.learner.learn(toy.answers(0, list(PROMPTS)), 0)
    assert all(map(torch.equal, before, weights(toy)))
    assert first["value_loss"] > 0
    toy.learner.learn(toy.answers(1, list(PROMPTS)), 1)
    assert not all(map(torch.equal, before, weights(toy)))


def test_the_critic_starts_at_the_mean_reward(folder: Path):
    toy = Toy(folder, a_config("ppo"))
    first = toy.learner.learn([an_answer(-6.0), an_answer(-2.0, 9), an_answer(None, 10)], 0)
    assert first["value_error"] == pytest.approx(4.0)
    second = toy.learner.learn([an_answer(5.0), an_answer(5.0, 9)], 1)
    assert second["value_error"] == pytest.approx(81.0, rel=0.1)  # only what it learned was added


def test_what_is_added_to_all_rewards_does_not_change_the_first_update(folder: Path):
    said = ((9, 9, 10), (RIGHT, 10, 10), (11, 9, RIGHT))
    norms: list[float] = []
    for added in (0.0, -6.0):
        engine = {"learning_rate": 0.01, "zero_stage": 2}  # stage 0 does not tell its norm
        toy = Toy(folder, a_config("ppo", engine=engine))
        answers = [
            replace(an_answer(reward + added), token_ids=tokens, sampler_logprobs=(-1.0,) * 3)
            for reward, tokens in zip((1.0, 2.0, 4.0), said, strict=True)
        ]
        toy.learner.learn(answers, 0)
        norms.append(toy.engine.grad_norm)
    assert norms[0] > 0
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_the_importance_weight_of_a_stale_answer_is_trainer_over_sampler(folder: Path):
    toy = Toy(folder, a_config("grpo", max_staleness=1))
    rollouts = toy.answers(0, ["p0"])
    halved = [replace(r, sampler_logprobs=(r.sampler_logprobs[0] + 0.5,)) for r in rollouts]
    rewarded = [replace(r, reward=float(i)) for i, r in enumerate(halved)]
    values = toy.learner.learn(rewarded, 0)
    assert values["importance_weight"] == pytest.approx(0.60653, abs=1e-4)  # exp(-0.5)
    assert "largest_sampler_difference" not in values  # nobody compared them


def test_fresh_answers_are_compared_with_the_trainer(folder: Path):
    toy = Toy(folder, a_config("grpo"))
    rollouts = [replace(r, reward=float(i)) for i, r in enumerate(toy.answers(0, ["p0"]))]
    off = [replace(rollouts[0], sampler_logprobs=(rollouts[0].sampler_logprobs[0] + 0.25,))]
    values = toy.learner.learn([*off, *rollouts[1:]], 0)
    assert values["largest_sampler_difference"] == pytest.approx(0.25, abs=1e-5)


@pytest.mark.parametrize("method", ["grpo", "ppo", "online_dpo"])
def test_micro_batches_do_not_change_the_gradient(folder: Path, method: str):
    norms: list[float] = []
    for answers_per_forward in (64, 3):
        engine = {"learning_rate": 0.01, "zero_stage": 2}  # stage 0 does not tell its norm
        config = a_config(method, answers_per_forward=answers_per_forward, engine=engine)
        toy = Toy(folder, config)
        rollouts = [
            replace(r, reward=float(i % 3)) for i, r in enumerate(toy.answers(0, list(PROMPTS)))
        ]
        toy.learner.learn(rollouts, 0)
        norms.append(toy.engine.grad_norm)
    assert norms[0] > 0
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_best_and_worst_need_a_margin_and_different_tokens():
    low, high, missing = an_answer(0.0, 9), an_answer(1.0, 10), an_answer(None, 11)
    assert best_and_worst([low, missing, high], 0.5) == (high, low)
    assert best_and_worst([low, high], 1.5) is None
    assert best_and_worst([an_answer(0.0), an_answer(1.0)], 0.5) is None
    assert best_and_worst([missing], 0.5) is None
