"""Every `training.method` through the whole loop, on a stack of random weights."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from speechalign.artifacts import verify_folder
from speechalign.config.align import AlignConfig
from speechalign.errors import ConfigError
from speechalign.pipeline.align import run_align
from speechalign.training.metrics import read_metrics
from speechalign.training.stored_pairs import read_pairs
from speechalign.types import PairKind
from tests.ray.conftest import FinishedRun
from tests.tiny_stack import TinyStack, tiny_recipe

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("cluster"),
    pytest.mark.timeout(1200),  # the finished run may be the first user's to wait for
]


def a_recipe(stack: TinyStack, run_dir: Path, method: str, **evaluation: object) -> AlignConfig:
    values = tiny_recipe(stack, run_dir).model_dump(mode="json")
    values["training"]["method"] = method
    values["evaluation"] |= evaluation
    return AlignConfig.model_validate(values)


def test_fine_tuning_on_the_chosen_makes_them_likelier(
    stack: TinyStack, finished: FinishedRun, tmp_path: Path
):
    config = a_recipe(stack, tmp_path / "run", "sft")
    finished.start_from(config, "prompts", "iteration-1/scored", "iteration-1/pairs")
    run_align(config, until="policy")
    folder = config.run_dir / "iteration-1"
    assert verify_folder(folder / "policy")["policy_version"] == 1
    rows = read_metrics(folder / "policy-work" / "metrics.jsonl")
    looks = [row for row in rows if "heldout_loss" in row]
    assert looks[0]["heldout_loss"] == pytest.approx(looks[0]["heldout_anchor"])
    assert looks[-1]["heldout_chosen_drop"] < 0


def test_kto_learns_from_golden_answers_and_samples_that_are_bad_alone(
    stack: TinyStack, finished: FinishedRun, tmp_path: Path
):
    values = a_recipe(stack, tmp_path / "run", "dpo").model_dump(mode="json")
    values["training"]["loss"] |= {"variant": "kto"}
    # The reward is minus the duration: every sample is bad, and the recordings are good.
    values["pairing"] = {"kinds": ["golden", "labelled"], "good_above": 1.0, "bad_below": 1.0}
    config = AlignConfig.model_validate(values)
    finished.start_from(config, "prompts", "iteration-1/scored")
    run_align(config, until="policy")
    folder = config.run_dir / "iteration-1"
    pairs = read_pairs(folder / "pairs")
    assert {p.kind for p in pairs} == {PairKind.GOLDEN, PairKind.LABELLED}
    assert not any(p.chosen_token_ids for p in pairs if p.kind is PairKind.LABELLED)
    rows = read_metrics(folder / "policy-work" / "metrics.jsonl")
    looks = [row["heldout_loss"] for row in rows if "heldout_loss" in row]
    assert looks[0] == pytest.approx(0.5, abs=1e-5)
    assert min(looks) < looks[0]


def test_chain_of_hindsight_makes_a_policy_that_knows_feedback(
    stack: TinyStack, finished: FinishedRun, tmp_path: Path
):
    config = a_recipe(stack, tmp_path / "run", "coh")
    finished.start_from(config, "prompts", "iteration-1/scored", "iteration-1/pairs")
    run_align(config, until="policy")
    folder = config.run_dir / "iteration-1"
    assert verify_folder(folder / "policy")["knows_feedback"] is True
    looks = [
        r for r in read_metrics(folder / "policy-work" / "metrics.jsonl") if "heldout_loss" in r
    ]
    assert looks[-1]["heldout_loss"] < looks[0]["heldout_loss"]


def test_best_of_n_trains_nothing_and_lets_the_reward_choose(stack: TinyStack, tmp_path: Path):
    config = a_recipe(stack, tmp_path / "run", "best_of_n", best_of=3)
    run_align(config, until="evaluation")
    run = config.run_dir
    assert not (run / "iteration-1" / "policy").exists()
    assert not (run / "iteration-0" / "candidates").exists()
    candidates = pq.read_table(run / "iteration-1" / "candidates" / "scored.parquet").to_pylist()
    chosen = pq.read_table(run / "iteration-1" / "evaluation" / "scored.parquet").to_pylist()
    single = pq.read_table(run / "iteration-0" / "evaluation" / "scored.parquet").to_pylist()
    assert (len(candidates), len(chosen), len(single)) == (18, 6, 6)
    for row in chosen:
        group = [c for c in candidates if c["prompt_id"] == row["prompt_id"]]
        shortest = min(c["duration_ratio"] for c in group)
        assert row["duration_ratio"] == pytest.approx(shortest)
    first = {row["prompt_id"]: row["token_ids"] for row in candidates if not row["sample_index"]}
    assert {row["prompt_id"]: row["token_ids"] for row in single} == first  # the same luck


def test_a_stage_that_best_of_n_does_not_have_cannot_be_asked_for(stack: TinyStack, tmp_path: Path):
    config = a_recipe(stack, tmp_path / "run", "best_of_n", best_of=3)
    with pytest.raises(ConfigError, match="best_of_n has no stage"):
        run_align(config, until="policy")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "set it above 1"),
        ({"evaluation": {"best_of": 2}, "pipeline": {"iterations": 2}}, "set pipeline.iterations"),
    ],
)
def test_a_choice_without_candidates_is_refused(
    stack: TinyStack, tmp_path: Path, changes: dict[str, dict[str, object]], message: str
):
    values = tiny_recipe(stack, tmp_path / "run").model_dump(mode="json")
    values["training"]["method"] = "best_of_n"
    for section, change in changes.items():
        values[section] |= change
    with pytest.raises(ValueError, match=message):
        AlignConfig.model_validate(values)
