"""Online methods through the real pipeline, on a stack of random weights.

What a method does with its rollouts needs no actor: tests/unit/test_online_training.py has all.
"""

from pathlib import Path
from typing import Any

import pytest

from speechalign.artifacts import verify_folder
from speechalign.config.align import AlignConfig
from speechalign.errors import ConfigError
from speechalign.pipeline.align import run_align
from speechalign.training.metrics import read_metrics
from tests.tiny_stack import TinyStack, tiny_recipe

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("cluster"),
]


LISTENER = {
    "kind": "python",
    "name": "duration",
    "target": "tests.user_rewards:Duration",
    "pool": {"num_cpus": 0.1},
}
"""A judge of held-out answers: the reward needs no sound."""


def a_recipe(stack: TinyStack, run_dir: Path, **training: Any) -> AlignConfig:
    """Return a recipe whose reward reads tokens, fails for a tenth and can be learned."""
    values = tiny_recipe(stack, run_dir).model_dump(mode="json")
    values["prompts"]["num_prompts"] = 32
    values["sampling"]["samples_per_prompt"] = 4
    values["judges"] = [
        {
            "kind": "python",
            "name": "low",
            "target": "tests.user_rewards:ShareOfLowTokens",
            "reads": "tokens",
            "arguments": {"fails": True},
            "pool": {"num_cpus": 0.1},
        }
    ]
    values["reward"] = {"terms": [{"measure": "low", "weight": 1.0}], "failure_budget": 0.5}
    values["training"] = {
        "num_steps": 4,
        "prompts_per_step": 8,
        "answers_per_forward": 8,
        "truncated": "kept",
        "checkpoint_every": 2,
        "heldout": {"every": 2, "num_prompts": 4},
        "guards": {"min_stop_share": 0.0, "max_kl": 10.0},
        "engine": {"learning_rate": 3e-3},
    } | training
    return AlignConfig.model_validate(values)


def metrics_of(config: AlignConfig) -> list[dict[str, float]]:
    return read_metrics(config.run_dir / "iteration-1" / "policy-work" / "metrics.jsonl")


@pytest.mark.parametrize(
    "training",
    [
        {
            "method": "grpo",
            "max_staleness": 1,
            "heldout": {"every": 2, "num_prompts": 4, "judges": [LISTENER]},
        },
        {"method": "ppo"},
    ],
    ids=lambda training: training["method"],
)
def test_a_policy_is_trained_on_its_own_answers(
    stack: TinyStack, tmp_path: Path, training: dict[str, Any]
):
    config = a_recipe(stack, tmp_path / "run", **training)
    run_align(config, until="policy")
    facts = verify_folder(config.run_dir / "iteration-1" / "policy")
    rows = metrics_of(config)
    staleness = training.get("max_staleness", 0)
    assert [row["step"] for row in rows if "grad_norm" in row] == [1, 2, 3, 4]
    looks = [row["step"] for row in rows if "heldout_reward" in row]
    assert looks == [0, 2 - staleness, 4]
    listened = [row["step"] for row in rows if "heldout_judge_duration" in row]
    assert listened == (looks if "heldout" in training else [])
    assert not any("judge_duration" in row for row in rows)
    assert facts["num_answers"] == 4 * 8 * 4 + 3 * 4 * 2
    assert 0 < facts["num_without_reward"] < facts["num_answers"] / 2
    assert facts["stop_reason"] == "all steps done"
    assert facts["largest_probe_difference"] < 1e-4
    assert not (config.run_dir / "iteration-1" / "scored").exists()


def test_online_methods_have_no_pairs_to_ask_for(stack: TinyStack, tmp_path: Path):
    config = a_recipe(stack, tmp_path / "run", method="grpo")
    with pytest.raises(ConfigError, match="grpo has no stage"):
        run_align(config, until="pairs")


def test_a_cluster_without_room_for_both_sides_is_refused(stack: TinyStack, tmp_path: Path):
    workers = {"num_workers": 2, "cpus_per_worker": 1.0}
    config = a_recipe(stack, tmp_path / "run", method="grpo", workers=workers)
    with pytest.raises(ConfigError, match="for the pools beside them"):
        run_align(config, until="policy")
