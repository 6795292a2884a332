"""Mistakes of a user are messages with exit codes, never tracebacks."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from speechalign.cli import main

RECIPE = Path(__file__).parents[2] / "jobs" / "align-embedded-cpu.yaml"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from speechalign.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_dry_run_prints_the_whole_recipe_and_reads_back():
    result = run("align", str(RECIPE), "training.loss.beta=0.25", "--dry-run")
    assert result.returncode == 0
    resolved = yaml.safe_load(result.stdout)
    assert resolved["training"]["loss"]["beta"] == 0.25
    assert resolved["pipeline"]["iterations"] == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.loss.bta=1", "did you mean 'beta'"),
        ("policy=runs/nowhere", "does not exist"),
        ("golden=runs/nowhere.parquet", "do not exist"),
        ("reward.terms.0.measure=loudness", "measured by no judge"),
        ("evaluation.judges.0.model=tiny.en", "give evaluation.judges another model"),
        ("sampling.temperatures=[1.0]", "needs samples of two temperatures"),
        ("rendering.num_levels=8", "knows"),
    ],
)
def test_a_mistake_in_a_recipe_is_exit_code_2_and_one_message(
    override: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(sys, "argv", ["speechalign", "align", str(RECIPE), override])
    with pytest.raises(SystemExit) as stopped:
        main()  # here: a process of its own would import torch to say one sentence
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_mistake_ends_the_process_without_a_traceback():
    result = run("align", str(RECIPE), "training.loss.bta=1")
    assert result.returncode == 2
    assert "did you mean 'beta'" in result.stderr
    assert "Traceback" not in result.stderr
