"""The whole main job on a stack of random weights: the order, the artifacts, the resume."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from speechalign.artifacts import verify_folder
from speechalign.config.load import dump_yaml
from speechalign.errors import ConfigError, CorruptArtifact
from speechalign.pipeline.align import StageName, run_align
from tests.ray.conftest import FinishedRun
from tests.tiny_stack import TinyStack, tiny_recipe

STEPS: tuple[StageName, ...] = ("samples", "scored", "pairs")

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("cluster"),
    pytest.mark.timeout(1200),  # the finished run may be the first user's to wait for
]


def test_one_command_runs_every_stage_and_again_does_nothing(finished: FinishedRun):
    run = finished.folder
    assert "before" in finished.text
    assert "iteration 1" in finished.text
    facts = verify_folder(run / "iteration-1" / "policy")
    assert facts["policy_version"] == 1
    pairs = verify_folder(run / "iteration-1" / "pairs")
    assert pairs["num_samples"] == 36
    assert pairs["max_logprob_difference"] < 1e-4
    scored = pq.read_table(run / "iteration-1" / "scored" / "scored.parquet")
    assert set(scored["policy_version"].to_pylist()) == {0}
    after = pq.read_table(run / "iteration-1" / "evaluation" / "scored.parquet")
    assert set(after["policy_version"].to_pylist()) == {1}
    page = (run / "report.html").read_text()
    assert "data:audio/flac" in page
    assert "t-SNE of golden and synthetic answers, iteration 2" in page
    assert "AUC golden against synthetic tokens, iteration 1" in finished.text
    first_look = json.loads(
        (run / "iteration-1" / "policy-work" / "metrics.jsonl").read_text().splitlines()[0]
    )
    assert first_look["heldout_loss"] == pytest.approx(0.693147, abs=1e-3)

    hashes = {path: path.stat().st_mtime_ns for path in sorted(run.rglob("manifest.json"))}
    run_align(finished.config)
    assert {path: path.stat().st_mtime_ns for path in sorted(run.rglob("manifest.json"))} == hashes


def test_stages_one_by_one_make_what_one_command_makes(
    stack: TinyStack, finished: FinishedRun, tmp_path: Path
):
    stepwise = tiny_recipe(stack, tmp_path / "run")
    for stage in STEPS:
        run_align(stepwise, until=stage)
    tables = [
        pq.read_table(config.run_dir / "iteration-1" / "pairs" / "pairs.parquet")
        for config in (finished.config, stepwise)
    ]
    assert tables[0].equals(tables[1])


def test_a_stage_that_all_iterations_have_is_not_gone_beyond(
    stack: TinyStack, finished: FinishedRun, tmp_path: Path
):
    config = tiny_recipe(stack, tmp_path / "run")
    finished.start_from(config, "prompts", "iteration-1/scored", "iteration-1/pairs")
    outcome = run_align(config, until="pairs")
    assert outcome.folder == config.run_dir / "iteration-1" / "pairs"
    assert sorted(path.name for path in (config.run_dir / "iteration-1").iterdir()) == [
        "pairs",
        "scored",
    ]


def test_more_workers_than_the_machine_has_are_refused_before_anything_is_sampled(
    stack: TinyStack, tmp_path: Path
):
    config = tiny_recipe(stack, tmp_path / "run")
    workers = config.training.workers.model_copy(update={"num_workers": 500})
    training = config.training.model_copy(update={"workers": workers})
    with pytest.raises(ConfigError, match="training wants 500 CPUs for 500 workers"):
        run_align(config.model_copy(update={"training": training}))
    on_gpus = config.training.workers.model_copy(update={"gpus_per_worker": 1.0})
    training = config.training.model_copy(update={"workers": on_gpus})
    with pytest.raises(ConfigError, match="training wants 2 GPUs for 2 workers"):
        run_align(config.model_copy(update={"training": training}))
    assert not (config.run_dir / "prompts").exists()


def test_a_damaged_stage_is_found_before_anything_builds_on_it(
    stack: TinyStack, finished: FinishedRun, tmp_path: Path
):
    config = tiny_recipe(stack, tmp_path / "run")
    finished.start_from(config, "prompts", "iteration-1/scored", "iteration-1/pairs")
    path = config.run_dir / "iteration-1" / "pairs" / "pairs.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptArtifact, match=r"pairs\.parquet differs"):
        run_align(config, until="policy")


def test_a_recipe_reads_back_from_its_run(finished: FinishedRun):
    assert (finished.folder / "config.yaml").read_text() == dump_yaml(finished.config)
