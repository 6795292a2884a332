"""Judges of held-out answers in a recipe: who may be one, what is checked, and what they hear."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from speechalign.config.align import AlignConfig
from speechalign.errors import ConfigError
from speechalign.pipeline import preflight
from speechalign.pipeline.preflight import check_resources, check_run
from speechalign.pipeline.sample import SOUND, rollout_judging_stages
from speechalign.rewards.stage import JudgeStage
from speechalign.rows import SAMPLE
from speechalign.sampling.heldout import HeldoutStage
from speechalign.sampling.stages import RenderStage
from tests.tiny_stack import TinyStack, build_tiny_stack, tiny_recipe

TOKENS = {
    "kind": "python",
    "name": "low",
    "target": "tests.user_rewards:ShareOfLowTokens",
    "reads": "tokens",
}
LISTENER = {"kind": "python", "name": "duration", "target": "tests.user_rewards:Duration"}
SIGNAL = {"kind": "signal"}
TINY, BASE = ({"kind": "recogniser", "model": model} for model in ("tiny.en", "base"))


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> TinyStack:
    return build_tiny_stack(tmp_path_factory.mktemp("stack"))


def online(judges: list[Any], heldout: list[Any], measure: str = "low") -> dict[str, Any]:
    """Return what of a recipe an online training with these judges changes."""
    return {
        "judges": judges,
        "reward": {"terms": [{"measure": measure, "weight": 1.0}]},
        "training": {"method": "grpo", "heldout": {"judges": heldout}},
    }


def a_recipe(judges: list[Any], heldout: list[Any], measure: str = "low") -> AlignConfig:
    paths = {"run_dir": "run", "golden": "golden", "policy": "policy", "nar": "nar"}
    return AlignConfig.model_validate(paths | online(judges, heldout, measure))


def test_a_measure_of_a_reward_has_no_second_judge_among_them():
    with pytest.raises(ValueError, match="two judges both measure duration_ratio, silence_ratio"):
        a_recipe([TOKENS, SIGNAL], [SIGNAL])


def test_they_may_measure_what_the_evaluation_measures():
    assert len(a_recipe([TOKENS], [BASE | {"role": "eval"}, SIGNAL]).heldout_judges) == 2


def test_what_they_measure_makes_no_reward():
    with pytest.raises(ValueError, match="'duration', which is measured by no judge in `judges`"):
        a_recipe([TOKENS], [LISTENER], measure="duration")


def test_a_recogniser_among_them_evaluates():
    message = r"a recogniser of training\.heldout\.judges needs role: eval"
    with pytest.raises(ValueError, match=message):
        a_recipe([TOKENS], [BASE | {"role": "reward"}])


def test_a_recogniser_among_them_is_not_the_one_that_makes_rewards():
    with pytest.raises(ValueError, match=r"'tiny\.en'.*give training\.heldout\.judges another"):
        a_recipe([TINY], [TINY | {"role": "eval"}], measure="reward_wer")
    a_recipe([TINY], [BASE | {"role": "eval"}], measure="reward_wer")


def test_who_trains_on_pairs_has_none(stack: TinyStack, tmp_path: Path):
    config = tiny_recipe(stack, tmp_path / "run")
    assert config.heldout_judges == ()
    stages = rollout_judging_stages(config, stack.ar)
    assert [stage.stage for stage in stages] == [RenderStage, JudgeStage]


@pytest.mark.parametrize(
    ("judges", "heldout", "heard_by_all", "of_heldout"),
    [
        ([TOKENS], [], ["low"], []),
        ([TOKENS], [LISTENER, SIGNAL], ["low"], ["render", "duration", "signal"]),
        ([TOKENS, SIGNAL], [LISTENER], ["render", "low", "signal"], ["duration"]),
        ([TOKENS], [TOKENS | {"name": "other"}], ["low"], ["other"]),
    ],
)
def test_what_nobody_else_needs_is_done_for_held_out_answers_only(
    judges: list[Any], heldout: list[Any], heard_by_all: list[str], of_heldout: list[str]
):
    stages = rollout_judging_stages(a_recipe(judges, heldout), Path("policy"))
    wrapped = [stage.name for stage in stages if stage.stage is HeldoutStage]
    others = [stage.name for stage in stages if stage.stage is not HeldoutStage]
    assert (others, wrapped) == (heard_by_all, of_heldout)
    judging = [stage.name for stage in stages if stage.name != "render"]
    assert judging == [judge.get("name", "signal") for judge in judges + heldout]


def test_rendering_adds_what_is_said_of_it(stack: TinyStack, tmp_path: Path):
    config = tiny_recipe(stack, tmp_path / "run", **online([TOKENS], [SIGNAL]))
    (render, *_) = rollout_judging_stages(config, stack.ar)
    nothing = SAMPLE.empty_table()
    added = render.arguments["stage"](**render.arguments["arguments"])(nothing).schema
    assert [field for field in added if field.name not in (*SAMPLE.names, "judge_errors")] == SOUND


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        (LISTENER | {"target": "tests.user_rewards:Nobody"}, "Nobody cannot be imported"),
        (LISTENER | {"name": "heldout_errors"}, "would write heldout_errors, which is taken"),
        (LISTENER | {"name": "low_seconds"}, "would write low_seconds, which is taken"),
        (
            {"kind": "http", "name": "far", "url": "http://x", "token_env": "NOT_THERE"},
            "NOT_THERE is not set",
        ),
        ({"kind": "reward_model", "path": "nowhere"}, "nowhere holds no reward model"),
    ],
)
def test_they_are_checked_before_anything_starts(
    stack: TinyStack, tmp_path: Path, judge: dict[str, Any], message: str
):
    check_run(tiny_recipe(stack, tmp_path / "run", **online([TOKENS], [LISTENER])))
    with pytest.raises(ConfigError, match=message):
        check_run(tiny_recipe(stack, tmp_path / "run", **online([TOKENS], [judge])))


def test_their_pools_need_room_beside_the_others(
    stack: TinyStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(preflight, "connected", nullcontext)
    monkeypatch.setattr(preflight, "possible_resources", lambda: {"CPU": 4.0})
    demanding = [LISTENER | {"pool": {"num_cpus": 3.9}}]
    check_resources(tiny_recipe(stack, tmp_path / "run", **online([TOKENS], [LISTENER])))
    with pytest.raises(ConfigError, match=r"the pools want .* render .*, duration 3\.9\)"):
        check_resources(tiny_recipe(stack, tmp_path / "run", **online([TOKENS], demanding)))
