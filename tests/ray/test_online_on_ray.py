"""PPO, GRPO and online DPO through the real pipeline, on a stack of random weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from speechalign.artifacts import verify_folder
from speechalign.config.align import AlignConfig
from speechalign.pipeline.align import run_align
from speechalign.pipeline.cluster import connected
from speechalign.training.metrics import read_metrics
from tests.tiny_stack import TinyStack, build_tiny_stack, tiny_recipe

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> TinyStack:
    return build_tiny_stack(tmp_path_factory.mktemp("stack"), num_clips=96)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with connected():  # one for all tests of the file
        yield


def a_recipe(stack: TinyStack, run_dir: Path, **training: Any) -> AlignConfig:
    values = tiny_recipe(stack, run_dir).model_dump(mode="json")
    values["prompts"]["num_prompts"] = 32
    values["training"] = {
        "num_steps": 4,
        "prompts_per_step": 4,
        "answers_per_forward": 4,
        "truncated": "kept",
        "checkpoint_every": 2,
        "heldout": {"every": 2, "num_prompts": 4},
        "guards": {"min_stop_share": 0.0},
        "engine": {"learning_rate": 1e-3},
    } | training
    return AlignConfig.model_validate(values)


def metrics_of(config: AlignConfig) -> list[dict[str, float]]:
    return read_metrics(config.run_dir / "iteration-1" / "policy-work" / "metrics.jsonl")


@pytest.mark.parametrize("method", ["grpo", "ppo", "online_dpo"])
def test_a_policy_is_trained_on_its_own_answers(stack: TinyStack, tmp_path: Path, method: str):
    config = a_recipe(stack, tmp_path / "run", method=method)
    run_align(config, until="policy")
    facts = verify_folder(config.run_dir / "iteration-1" / "policy")
    rows = metrics_of(config)
    steps = [row["step"] for row in rows if "grad_norm" in row]
    looks = [row["step"] for row in rows if "heldout_reward" in row]
    assert steps == [1, 2, 3, 4]
    assert looks == [0, 2, 4]
    assert facts["num_answers"] == 4 * 4 * 3 + 3 * 4 * 2
    assert facts["stop_reason"] == "all steps done"
    assert facts["largest_probe_difference"] < 1e-4
