"""`speechalign compare`: arms share what they can, and one table has them all."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from speechalign.config.compare import CompareConfig
from speechalign.config.load import dump_yaml
from speechalign.pipeline.compare import run_compare
from tests.tiny_stack import TinyStack, tiny_recipe

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("cluster"),
]


@pytest.mark.timeout(900)
def test_two_arms_and_a_reward_model_make_one_table(stack: TinyStack, tmp_path: Path):
    recipe = tmp_path / "align.yaml"
    recipe.write_text(dump_yaml(tiny_recipe(stack, tmp_path / "unused")))
    reward = tmp_path / "reward.yaml"
    reward.write_text(
        json.dumps(
            {
                "policy": str(stack.ar),
                "pairs": ["unused"],
                "output": "unused",
                "num_steps": 2,
                "rows_per_step": 2,
                "heldout_every": 1,
                "workers": {"num_workers": 1},
            }
        )
    )
    chooses = {
        "judges": [{"kind": "reward_model", "path": "{run}/rm", "pool": {"num_cpus": 0.1}}],
        "reward.terms": [{"measure": "reward_model", "weight": 1.0}],
        "training": {"method": "best_of_n"},
        "pairing": {},
        "evaluation.best_of": 2,
    }
    config = CompareConfig.model_validate(
        {
            "run_dir": tmp_path / "compare",
            "recipe": recipe,
            "reward_model": "rm",
            "steps": [
                {"kind": "arm", "name": "dpo", "label": "DPO"},
                {
                    "kind": "reward_model",
                    "name": "rm",
                    "recipe": reward,
                    "overrides": {"pairs": ["{run}/dpo/iteration-1/pairs"]},
                },
                {"kind": "arm", "name": "best", "label": "best of 2", "overrides": chooses},
            ],
        }
    )
    text = run_compare(config)
    result = json.loads((config.run_dir / "compare.json").read_text())
    names = [row["summary"]["name"] for row in result["rows"]]
    assert names == ["SFT", "DPO", "best of 2", "golden level 1 + NAR"]
    assert result["rows"][0]["wins"] == {}
    assert "reward_model" in result["rows"][2]["wins"]
    assert "| best of 2 |" in text
    it_says_what_took_how_long(result)
    assert "<svg" in (config.run_dir / "compare.svg").read_text()
    scored = [
        config.run_dir / arm / "iteration-0" / "evaluation" / "scored.parquet"
        for arm in ("dpo", "best")
    ]
    assert pq.read_table(scored[0]).equals(pq.read_table(scored[1]))
    before = {path: path.stat().st_mtime_ns for path in config.run_dir.rglob("manifest.json")}
    run_compare(config)
    after = {path: path.stat().st_mtime_ns for path in config.run_dir.rglob("manifest.json")}
    assert after == before
    earlier = tmp_path / "earlier.json"
    (config.run_dir / "compare.json").replace(earlier)
    run_compare(config, only=["best"], earlier=earlier)
    merged = json.loads((config.run_dir / "compare.json").read_text())
    assert [row["summary"]["name"] for row in merged["rows"]] == names
    assert merged["table"] == json.loads(earlier.read_text())["table"]
    a_part_needs_no_reward_model(config, tmp_path)


def it_says_what_took_how_long(result: Mapping[str, Any]) -> None:
    row = result["rows"][1]
    assert row["seconds"] > 0
    assert set(row["stage_seconds"]) == {"scored", "pairs", "policy", "evaluation"}
    assert [cells[0] for cells in result["times"]] == ["minutes", "DPO", "best of 2"]
    assert float(result["facts"]["minutes of rm"]) > 0


def a_part_needs_no_reward_model(config: CompareConfig, elsewhere: Path) -> None:
    (config.run_dir / "rm").rename(elsewhere / "rm")
    run_compare(config, only=["dpo"])
    part = json.loads((config.run_dir / "compare.json").read_text())
    assert "duration" in part["rows"][1]["summary"]["estimates"]
    assert part["rows"][1]["wins"] == {}
