"""A reward that could never be made is refused before anything starts."""

from pathlib import Path
from typing import Any

import pytest

from speechalign.config.align import AlignConfig
from speechalign.config.judges import (
    HttpJudgeConfig,
    JudgeConfig,
    PythonJudgeConfig,
    SignalConfig,
)
from speechalign.errors import ConfigError
from speechalign.pipeline.preflight import check_judge_names
from speechalign.pipeline.sample import judging_stages

PATHS = {"run_dir": "run", "golden": "golden", "policy": "policy", "nar": "nar"}
SIGNAL = {"kind": "signal"}
TOKENS = {"kind": "python", "name": "mine", "target": "a.b:C", "reads": "tokens"}
REMOTE = {"kind": "http", "name": "far", "url": "http://localhost:1"}


def a_recipe(judges: list[Any], measures: list[str], **changes: Any) -> AlignConfig:
    terms = [{"measure": measure, "weight": 1.0} for measure in measures]
    return AlignConfig.model_validate(
        PATHS | {"judges": judges, "reward": {"terms": terms}} | changes
    )


def a_python_judge(name: str) -> PythonJudgeConfig:
    return PythonJudgeConfig(name=name, target="a.b:C")


def test_the_names_of_ones_own_judges_are_measures():
    recipe = a_recipe([TOKENS, REMOTE], ["mine", "far"])
    assert [term.measure for term in recipe.reward.terms] == ["mine", "far"]


def test_truncation_is_measured_whoever_judges():
    assert a_recipe([], ["truncated"]).reward.terms[0].measure == "truncated"


def test_a_measure_of_no_judge_is_refused_with_those_that_there_are():
    message = (
        "reward.terms uses 'yours', which is measured by no judge in `judges`; available: mine"
    )
    with pytest.raises(ValueError, match=message):
        a_recipe([TOKENS], ["yours"])


def test_golden_pairs_against_the_first_sample_need_no_reward():
    golden = {"kinds": ["golden"], "golden_rejected": "first"}
    assert AlignConfig.model_validate(PATHS | {"pairing": golden}).judges == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"pairing": {"kinds": ["ranked"]}},
        {"pairing": {"kinds": ["golden", "ranked"]}},
        {"pairing": {"kinds": ["golden"], "golden_rejected": "worst"}},
        {"pairing": {"kinds": ["golden"]}, "evaluation": {"best_of": 2}},
    ],
)
def test_whatever_else_chooses_needs_one(changes: dict[str, Any]):
    with pytest.raises(ValueError, match=r"reward\.terms is empty"):
        a_recipe([], [], **changes)


@pytest.mark.parametrize(
    ("judges", "column"),
    [
        ([a_python_judge("text")], "text"),
        ([a_python_judge("truncated")], "truncated"),
        ([a_python_judge("step")], "step"),
        ([HttpJudgeConfig(name="sample", url="http://x")], "sample_seconds"),
        ([a_python_judge("rendering")], "rendering"),
        ([SignalConfig(), a_python_judge("signal")], "signal_seconds"),
        ([SignalConfig(), a_python_judge("silence_ratio")], "silence_ratio"),
    ],
)
def test_a_judge_cannot_have_a_name_that_is_taken(judges: list[JudgeConfig], column: str):
    with pytest.raises(ConfigError, match=f"would write {column}, which is taken"):
        check_judge_names(judges)


def test_judges_with_names_of_their_own_are_welcome():
    check_judge_names([SignalConfig(), a_python_judge("mine"), a_python_judge("other")])


@pytest.mark.parametrize(
    ("judges", "stages"),
    [
        ([TOKENS], ["mine"]),
        ([TOKENS, SIGNAL], ["render", "mine", "signal"]),
        ([REMOTE], ["render", "far"]),
        ([], []),
    ],
)
def test_only_a_judge_that_listens_has_anything_rendered(judges: list[Any], stages: list[str]):
    recipe = a_recipe(judges, [], pairing={"kinds": ["golden"]})
    found = judging_stages(recipe, Path("policy"), recipe.judges)
    assert [stage.name for stage in found] == stages


@pytest.mark.parametrize("method", ["ppo", "grpo", "online_dpo"])
def test_a_reward_whose_mean_is_0_for_every_policy_chooses_no_version(method: str):
    changes = {"sampling": {"samples_per_prompt": 4}, "training": {"method": method}}
    terms = [{"measure": "mine", "weight": 1.0}]
    with pytest.raises(ValueError, match="normalise: group makes 0"):
        AlignConfig.model_validate(
            PATHS | {"judges": [TOKENS], "reward": {"terms": terms, "normalise": "group"}} | changes
        )


@pytest.mark.parametrize("method", ["ppo", "online_dpo"])
def test_who_leaves_cut_answers_out_is_not_rewarded_for_them(method: str):
    measures = ["mine", "truncated"]
    with pytest.raises(ValueError, match=r"teaches nothing; set training\.truncated: kept"):
        a_recipe([TOKENS], measures, training={"method": method})
    a_recipe([TOKENS], measures, training={"method": method, "truncated": "kept"})
    a_recipe([TOKENS], ["mine"], training={"method": method})


def test_grpo_may_compare_with_a_cut_answer_that_it_masks():
    a_recipe([TOKENS], ["mine", "truncated"], training={"method": "grpo"})


@pytest.mark.parametrize(("place", "role"), [("judges", "eval"), ("evaluation", "reward")])
def test_a_recogniser_has_the_role_of_its_place(place: str, role: str):
    judges = [{"kind": "recogniser", "model": "tiny.en", "role": role}]
    changes = {"judges": judges} if place == "judges" else {"evaluation": {"judges": judges}}
    golden = {"judges": [], "pairing": {"kinds": ["golden"]}}
    with pytest.raises(ValueError, match="needs role"):
        AlignConfig.model_validate(PATHS | golden | changes)


SPEAKER = {"kind": "speaker"}
SAME_AS_TOKENS = TOKENS | {"name": "other"}


@pytest.mark.parametrize(
    ("judge", "measure", "evaluating"),
    [
        (SPEAKER, "speaker_similarity", [SPEAKER]),
        (SPEAKER, "speaker_similarity", [SPEAKER | {"num_threads": 2}]),
        (TOKENS, "mine", [SAME_AS_TOKENS]),
        (REMOTE, "far", [REMOTE | {"name": "near"}]),
    ],
)
def test_a_policy_is_not_evaluated_by_its_reward_alone(
    judge: Any, measure: str, evaluating: list[Any]
):
    with pytest.raises(ValueError, match="nothing but what makes the reward"):
        a_recipe([judge], [measure], evaluation={"judges": evaluating})
    a_recipe([judge], [measure], evaluation={"judges": [*evaluating, {"kind": "distillmos"}]})
    a_recipe([judge], ["truncated"], evaluation={"judges": evaluating})  # it makes no reward now


@pytest.mark.parametrize(
    ("judge", "measure", "evaluating"),
    [
        (SIGNAL, "duration_ratio", SIGNAL),  # it measures the silence too
        (TOKENS, "mine", TOKENS | {"target": "a.b:D"}),
        (TOKENS, "mine", TOKENS | {"arguments": {"language": "de"}}),
        (REMOTE, "far", REMOTE | {"url": "http://localhost:2"}),
    ],
)
def test_another_measure_or_another_model_may_evaluate(judge: Any, measure: str, evaluating: Any):
    a_recipe([judge], [measure], evaluation={"judges": [evaluating]})


def test_an_evaluation_without_a_judge_is_refused():
    with pytest.raises(ValueError, match=r"evaluation\.judges is empty"):
        a_recipe([SIGNAL], ["duration_ratio"], evaluation={"judges": []})


def test_two_judges_of_one_measure_are_refused():
    with pytest.raises(ValueError, match="two judges both measure duration_ratio, silence_ratio"):
        a_recipe([SIGNAL, SIGNAL], ["duration_ratio"])
