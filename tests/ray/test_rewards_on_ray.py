"""Rewards of one's own on the way to pairs: failures are missing, silence is not rendered."""

import gc
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray

from speechalign.artifacts import manifest_facts
from speechalign.config.align import AlignConfig
from speechalign.errors import BudgetExceeded, ConfigError
from speechalign.judges.base import SILENT
from speechalign.pipeline.align import run_align
from speechalign.pipeline.cluster import connected
from speechalign.training.stored_pairs import read_pairs
from tests.tiny_stack import TinyStack, build_tiny_stack, tiny_recipe
from tests.user_rewards import is_one_of_ten

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("cluster"),
]


def a_recipe(stack: TinyStack, run_dir: Path, reward: dict[str, Any], **judge: Any) -> AlignConfig:
    values = tiny_recipe(stack, run_dir).model_dump(mode="json")
    values["judges"] = [{"kind": "python", "name": "mine", "pool": {"num_cpus": 0.1}} | judge]
    values["reward"] = {"terms": [{"measure": "mine", "weight": 1.0}]} | reward
    values["pairing"] = {"kinds": ["ranked"], "min_margin": 0.01}
    return AlignConfig.model_validate(values)


def test_a_reward_that_fails_for_a_tenth_of_the_samples_leaves_the_others(tmp_path: Path):
    stack = build_tiny_stack(tmp_path / "stack")  # the shared one has only ties
    judge = {"target": "tests.user_rewards:FailsForATenth", "reads": "sound"}
    config = a_recipe(stack, tmp_path / "run", {"failure_budget": 0.2}, **judge)
    run_align(config, until="pairs")
    folder = config.run_dir / "iteration-1"
    rows = pq.read_table(folder / "scored" / "scored.parquet").to_pylist()
    ids = [f"{row['prompt_id']}/{row['sample_index']}" for row in rows]
    failed = [sample_id for sample_id in ids if is_one_of_ten(sample_id)]
    assert 0 < len(failed) < 0.2 * len(ids)
    assert [row["mine"] is None for row in rows] == [is_one_of_ten(i) for i in ids]
    reasons = [row["judge_errors"] for row in rows if row["mine"] is None]
    assert [reason.removesuffix(f" ({SILENT})") for reason in reasons] == [
        f"mine: RuntimeError: I cannot hear {sample_id}" for sample_id in failed
    ]
    facts = manifest_facts(folder / "pairs")
    assert (facts["num_samples"], facts["num_without_reward"]) == (36, len(failed))
    rewarded = [row["mine"] for row in rows if row["mine"] is not None]
    assert facts["mean_reward"] == pytest.approx(sum(rewarded) / len(rewarded))
    unheard = {(row["prompt_id"], *row["token_ids"]) for row in rows if row["mine"] is None}
    for pair in read_pairs(folder / "pairs"):
        assert (pair.prompt_id, *pair.chosen_token_ids) not in unheard
        assert (pair.prompt_id, *pair.rejected_token_ids) not in unheard

    strict = a_recipe(stack, tmp_path / "strict", {"failure_budget": 0.01}, **judge)
    for stage in ("prompts", "iteration-1/scored"):
        shutil.copytree(config.run_dir / stage, strict.run_dir / stage)
    with pytest.raises(BudgetExceeded, match=r"of 36 samples have no reward.*I cannot hear"):
        run_align(strict, until="pairs")


def test_a_reward_of_tokens_has_nothing_rendered(stack: TinyStack, tmp_path: Path):
    terms = [{"measure": "mine", "weight": 1.0}, {"measure": "truncated", "weight": -0.5}]
    config = a_recipe(
        stack,
        tmp_path / "run",
        {"terms": terms, "normalise": "group"},
        target="tests.user_rewards:ShareOfLowTokens",
        reads="tokens",
    )
    run_align(config, until="pairs")
    folder = config.run_dir / "iteration-1"
    assert set(manifest_facts(folder / "scored")["stage_seconds"]) == {"sample", "mine"}
    scored = pq.read_table(folder / "scored" / "scored.parquet")
    assert "golden_duration_s" not in scored.column_names
    assert scored["mine"].null_count == 0
    facts = manifest_facts(folder / "pairs")
    assert facts["pairs_ranked"] > 0
    assert facts["mean_reward"] == pytest.approx(0.0, abs=1e-6)  # of every group, so of all


@pytest.fixture
def only_references() -> Iterator[None]:
    """Nothing is collected by chance, nor held by pytest's log of the error."""
    gc.collect()
    gc.disable()
    logging.disable()
    yield
    logging.disable(logging.NOTSET)
    gc.enable()


@pytest.mark.usefixtures("only_references")
def test_a_reward_that_cannot_be_made_stops_the_run_with_its_reason_and_leaves_no_actor(
    stack: TinyStack, tmp_path: Path
):
    target = "tests.user_rewards:Broken"
    config = a_recipe(stack, tmp_path / "run", {}, target=target, reads="tokens")
    with pytest.raises(ConfigError, match="cannot be created: OSError: no model here"):
        run_align(config, until="scored")
    with connected():
        deadline = time.monotonic() + 60
        while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
            assert time.monotonic() < deadline, ray.available_resources()
            time.sleep(0.5)


def test_a_reward_that_is_nowhere_is_refused_before_anything_is_sampled(
    stack: TinyStack, tmp_path: Path
):
    target = "tests.user_rewards:NoSuch"
    config = a_recipe(stack, tmp_path / "run", {}, target=target, reads="tokens")
    with pytest.raises(ConfigError, match="cannot be imported"):
        run_align(config)
    assert not config.run_dir.exists()
