"""The paper's pairs need no judge: nothing is rendered, nobody is asked."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from speechalign.artifacts import manifest_facts
from speechalign.config.align import AlignConfig
from speechalign.pipeline.align import run_align
from tests.tiny_stack import TinyStack, tiny_recipe

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("cluster"),
]


def test_golden_pairs_are_made_without_a_judge(stack: TinyStack, tmp_path: Path):
    values = tiny_recipe(stack, tmp_path / "run").model_dump(mode="json")
    values |= {"judges": [], "reward": {}, "pairing": {"kinds": ["golden"]}}
    values["sampling"]["samples_per_prompt"] = 1
    config = AlignConfig.model_validate(values)
    run_align(config, until="samples")  # drawn once, and taken as they are
    run_align(config, until="pairs")
    folder = config.run_dir / "iteration-1"
    scored = pq.read_table(folder / "scored" / "scored.parquet")
    assert scored.equals(pq.read_table(folder / "samples" / "scored.parquet"))
    assert "waveform_pcm" not in scored.column_names
    assert "golden_duration_s" not in scored.column_names
    assert list(manifest_facts(folder / "scored")["stage_seconds"]) == ["sample"]
    facts = manifest_facts(folder / "pairs")
    assert facts["pairs_golden"] == scored.num_rows == 12
    assert facts["num_without_reward"] == 0
    assert facts["mean_reward"] is None  # nobody was asked, which is no zero
