"""A comparison's file: what is refused, and what two arms share."""

from pathlib import Path

import pytest

from speechalign.artifacts import committed_folder, is_committed
from speechalign.config.compare import ArmConfig, CompareConfig, RewardModelStepConfig
from speechalign.pipeline.compare import Arm, arms_of, share_stages

RECIPE = Path("jobs/align-embedded-cpu.yaml")


def a_comparison(run_dir: Path, *arms: ArmConfig) -> CompareConfig:
    return CompareConfig(run_dir=run_dir, recipe=RECIPE, steps=arms)


def an_arm(run_dir: Path, name: str, **overrides: object) -> Arm:
    step = ArmConfig(name=name, label=name, overrides=overrides)
    (arm,) = arms_of(a_comparison(run_dir, step), step)
    return arm


def finish(arm: Arm, stage: str) -> None:
    with committed_folder(arm.config.run_dir / stage, {"by": arm.step.name}):
        pass


@pytest.mark.parametrize(
    ("overrides", "shared"),
    [
        (
            {"training.loss.beta": 0.2},
            {"prompts", "iteration-0/evaluation", "iteration-1/scored"},
        ),
        (
            {"sampling.samples_per_prompt": 4},
            {"prompts", "iteration-0/evaluation"},
        ),
        ({"prompts.num_prompts": 64}, {"iteration-0/evaluation"}),
        ({"rendering.num_levels": 2}, {"prompts"}),
        ({"evaluation.temperature": 1.0}, {"prompts", "iteration-1/scored"}),
        ({"policy": "another"}, set()),
        (
            {"pools.sample.num_actors": 2},
            {"prompts", "iteration-0/evaluation", "iteration-1/scored"},
        ),
    ],
)
def test_arms_share_the_stages_that_do_not_depend_on_what_differs(
    tmp_path: Path, overrides: dict[str, object], shared: set[str]
):
    first, second = an_arm(tmp_path, "first"), an_arm(tmp_path, "second", **overrides)
    stages = ["prompts", "iteration-0/evaluation", "iteration-1/scored"]
    for stage in stages:
        finish(first, stage)
    share_stages(second.config, [first.config])
    assert {s for s in stages if is_committed(second.config.run_dir / s)} == shared


def test_best_of_n_shares_the_evaluation_of_the_start(tmp_path: Path):
    first = an_arm(tmp_path, "first")
    best = an_arm(
        tmp_path, "best", **{"training": {"method": "best_of_n"}, "evaluation.best_of": 4}
    )
    finish(first, "iteration-0/evaluation")
    share_stages(best.config, [first.config])
    assert is_committed(best.config.run_dir / "iteration-0/evaluation")


def test_an_arm_has_a_run_for_each_seed_and_the_heldout_prompts_stay(tmp_path: Path):
    step = ArmConfig(name="dpo", label="DPO", seeds=(0, 3))
    arms = arms_of(a_comparison(tmp_path, step), step)
    assert [arm.config.run_dir.name for arm in arms] == ["dpo-seed0", "dpo-seed3"]
    assert [(arm.config.seed, arm.config.training.seed) for arm in arms] == [(0, 0), (3, 3)]
    assert {arm.config.evaluation.seed for arm in arms} == {0}
    assert arms[1].label(1) == "DPO, seed 3"


def test_the_folder_of_the_comparison_can_be_named_in_an_override(tmp_path: Path):
    judges = [{"kind": "reward_model", "path": "{run}/rm"}]
    terms = [{"measure": "reward_model", "weight": 1}]
    arm = an_arm(tmp_path, "ppo", **{"judges": judges, "reward.terms": terms})
    assert str(arm.config.judges[0].path) == f"{tmp_path}/rm"  # pyright: ignore


@pytest.mark.parametrize("name", ["../x", "a/b", "A", "", "a\n"])
def test_a_name_that_is_no_folder_of_its_own_is_refused(name: str):
    with pytest.raises(ValueError, match="should match pattern"):
        ArmConfig(name=name, label="A")
    with pytest.raises(ValueError, match="should match pattern"):
        RewardModelStepConfig(name=name, recipe=RECIPE)


def test_two_steps_of_one_name_are_refused(tmp_path: Path):
    step = ArmConfig(name="a", label="A")
    with pytest.raises(ValueError, match="two steps have the same name"):
        a_comparison(tmp_path, step, step)


def test_a_reward_model_that_no_step_trains_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="no reward model step"):
        CompareConfig(
            run_dir=tmp_path,
            recipe=RECIPE,
            steps=(ArmConfig(name="a", label="A"),),
            reward_model="rm",
        )
