"""What `make demo` must leave behind; .ci/run names the run in SPEECHALIGN_DEMO_RUN."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from speechalign.artifacts import verify_folder
from speechalign.evaluation.summary import Summary


@pytest.fixture
def run_dir() -> Path:
    value = os.environ.get("SPEECHALIGN_DEMO_RUN")
    if value is None:
        pytest.skip("set SPEECHALIGN_DEMO_RUN to the folder of a finished demo")
    return Path(value)


def test_every_stage_is_whole(run_dir: Path):
    for stage in ("scored", "pairs", "policy", "evaluation"):
        verify_folder(run_dir / "iteration-1" / stage)


def test_sampler_and_trainer_agree_about_the_same_tokens(run_dir: Path):
    facts = verify_folder(run_dir / "iteration-1" / "pairs")
    assert 0 < facts["max_logprob_difference"] <= 1e-4


def test_the_policy_speaks_and_was_measured_before_and_after(run_dir: Path):
    result = json.loads((run_dir / "result.json").read_text())
    systems = [Summary.from_json(values) for values in result["systems"]]
    assert [system.name for system in systems] == ["golden level 1 + NAR", "before", "iteration 1"]
    for system in systems:
        assert {"wer", "cer", "sim", "distillmos"} <= system.estimates.keys()
        assert system.estimates["wer"].value < 0.5


def test_the_report_can_be_listened_to(run_dir: Path):
    page = (run_dir / "report.html").read_text()
    assert page.count("<audio") >= 3


def test_the_doctor_hears_the_embedded_policy_say_a_sentence(run_dir: Path, tmp_path: Path):
    del run_dir  # only after a demo, when the machine is known to be able to
    code = "from speechalign.cli import main; main()"
    recipe = Path(__file__).parents[2] / "jobs" / "align-embedded-cpu.yaml"
    result = subprocess.run(
        [sys.executable, "-c", code, "doctor", str(recipe), f"run_dir={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "ok    engine: said" in result.stdout
