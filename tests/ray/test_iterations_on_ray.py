"""The wheel turns twice: which pairs it keeps, what it reports, when a guard stops it."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from speechalign.artifacts import committed_folder, manifest_facts, verify_folder
from speechalign.config.align import AlignConfig
from speechalign.pipeline.align import run_align
from speechalign.pipeline.pair import write_pairs
from speechalign.sampling.pipeline import SCORED
from tests.ray.conftest import FinishedRun
from tests.tiny_stack import TinyStack, tiny_recipe

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("cluster"),
    pytest.mark.timeout(1200),  # the finished run may be the first user's to wait for
]


def versions_of_pairs(run_dir: Path, num_iterations: int) -> list[list[int]]:
    """Return, for each iteration, the policy versions whose samples it was trained on, in order."""
    tables = [
        pq.read_table(run_dir / f"iteration-{number}" / "pairs" / "pairs.parquet")
        for number in range(1, num_iterations + 1)
    ]
    return [list(dict.fromkeys(row["policy_version"] for row in t.to_pylist())) for t in tables]


def test_iterations_are_reported_one_by_one(finished: FinishedRun):
    run = finished.folder
    assert versions_of_pairs(run, 2) == [[0], [0, 1]]
    for number in (1, 2):
        assert verify_folder(run / f"iteration-{number}" / "policy")["policy_version"] == number
        folder = run / f"iteration-{number}" / "evaluation" / SCORED
        assert set(pq.read_table(folder)["policy_version"].to_pylist()) == {number}

    names = ["before", "iteration 1", "iteration 2"]
    result = json.loads((run / "result.json").read_text())
    assert [s["name"] for s in result["systems"][1:]] == names
    assert list(result["differences"]) == names[1:]
    before, *later = (s["estimates"]["silence"]["value"] for s in result["systems"][1:])
    for name, value in zip(names[1:], later, strict=True):
        difference = result["differences"][name]["silence"]["value"]
        assert difference == pytest.approx(value - before)
        assert f"{name}, difference (paired)" in finished.text
    page = (run / "report.html").read_text()
    assert "duration ratio, system by system" in page
    assert page.count("DPO, iteration ") == 2
    assert (
        f"{manifest_facts(run / 'iteration-2' / 'pairs')['num_earlier_pairs']} of earlier" in page
    )

    best = verify_folder(run / "best")
    assert best["iteration"] == result["verdict"]["best"]
    assert (run / best["policy"] / "model.safetensors").is_file()
    assert f"best: {names[best['iteration']]}" in finished.text


def as_iteration(config: AlignConfig, number: int) -> None:
    """Let the samples of iteration 1 be those of a later iteration's policy."""
    table = pq.read_table(config.run_dir / "iteration-1" / "scored" / SCORED)
    changes = {
        "policy_version": pa.array([number - 1] * len(table), pa.int64()),
        "temperature": pa.array([0.7] * len(table), pa.float32()),  # no policy to probe
    }
    for name, column in changes.items():
        index = table.column_names.index(name)
        table = table.set_column(index, name, column.cast(table.schema.field(name).type))
    folder = config.run_dir / f"iteration-{number}" / "scored"
    with committed_folder(folder, {"kind": "scored"}) as partial:
        pq.write_table(table, partial / SCORED)


def test_earlier_pairs_are_none_or_by_default_the_previous_or_all(
    stack: TinyStack, finished: FinishedRun, tmp_path: Path
):
    config = tiny_recipe(stack, tmp_path / "run", pipeline={"iterations": 3})
    finished.start_from(config, "prompts", "iteration-1/scored")
    assert config.pipeline.earlier_pairs == "previous"
    kept = {
        "none": [[0], [1], [2]],
        "previous": [[0], [0, 1], [1, 2]],
        "all": [[0], [0, 1], [0, 1, 2]],
    }
    for earlier, versions in kept.items():
        pipeline = config.pipeline.model_copy(update={"earlier_pairs": earlier})
        changed = config.model_copy(update={"pipeline": pipeline})
        for number in (1, 2, 3):
            if number > 1:
                as_iteration(config, number)
            write_pairs(changed, number, config.run_dir / f"iteration-{number}" / "pairs")
        assert versions_of_pairs(config.run_dir, 3) == versions


def lengthen(config: AlignConfig, iteration: int) -> None:
    """Let an iteration's clips last three times as long as the recordings."""
    folder = config.run_dir / f"iteration-{iteration}" / "evaluation"
    table = pq.read_table(folder / SCORED)
    column = table.column_names.index("duration_ratio")
    ratios = pa.array([3.0] * len(table), pa.float32())
    with committed_folder(folder, manifest_facts(folder)) as partial:
        pq.write_table(table.set_column(column, "duration_ratio", ratios), partial / SCORED)


def test_a_guard_stops_the_run_keeps_the_start_and_stops_it_again(
    stack: TinyStack, finished: FinishedRun, tmp_path: Path
):
    pipeline = {"iterations": 2, "guards": {"stop_when_worse": True}}
    config = tiny_recipe(stack, tmp_path / "run", pipeline=pipeline)
    finished.start_from(config, "prompts", "iteration-0", "iteration-1")
    lengthen(config, 1)
    run = config.run_dir
    assert run_align(config, until="evaluation").folder == run / "iteration-1" / "evaluation"
    assert not (run / "best").exists()  # one stage was asked for, and the report is another
    outcome = run_align(config)
    assert not (run / "iteration-2").exists()
    best = verify_folder(run / "best")
    assert (best["iteration"], best["stopped_after"]) == (0, 1)
    assert (run / best["policy"]).resolve() == stack.ar.resolve()
    for stage in ("ceiling", "reference"):
        verify_folder(run / stage)
    said = (run / "result.txt").read_text()
    assert "iteration 1 is worse than before: duration error by +" in said
    assert "stopped by a guard after iteration 1" in said
    assert "best: before" in outcome.text
    assert "Stopped by a guard after iteration 1." in (run / "report.html").read_text()
    (comparison,) = json.loads((run / "result.json").read_text())["verdict"]["comparisons"]
    assert comparison["violations"][0]["worse_by"]["low"] > 0.1

    times = {path: path.stat().st_mtime_ns for path in sorted(run.rglob("manifest.json"))}
    again = run_align(config)
    assert again.text == outcome.text
    assert not (run / "iteration-2").exists()
    assert {p: p.stat().st_mtime_ns for p in sorted(run.rglob("manifest.json"))} == times
