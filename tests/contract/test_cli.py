"""Mistakes of a user are messages with exit codes, never tracebacks."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from speechalign.cli import main
from speechalign.config.align import AlignConfig
from speechalign.config.judges import PythonJudgeConfig
from speechalign.errors import (
    BudgetExceeded,
    ConfigError,
    CorruptArtifact,
    DataError,
    Diverged,
    LogprobMismatch,
    RunLocked,
    Stopped,
)
from speechalign.judges.user_code import load_user_class
from speechalign.pipeline.align import Outcome

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


def test_a_judge_of_ones_own_may_lie_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A console script has its own folder on the path, and not the current one."""
    (tmp_path / "a_reward_of_mine.py").write_text(
        "class Mine:\n    def __call__(self, samples):\n        return [1.0 for _ in samples]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    judge = "judges=[{kind: python, name: mine, target: 'a_reward_of_mine:Mine', reads: sound}]"
    reward = "reward={terms: [{measure: mine, weight: 1.0}]}"
    monkeypatch.setattr(sys, "argv", ["speechalign", "align", str(RECIPE), judge, reward])
    loaded: list[str] = []

    def check(config: AlignConfig, *, until: str) -> Outcome:
        assert isinstance(config.judges[0], PythonJudgeConfig)
        loaded.append(load_user_class(config.judges[0]).__name__)
        return Outcome(text=until, folder=config.run_dir)

    monkeypatch.setattr("speechalign.pipeline.align.run_align", check)
    with pytest.raises(SystemExit):
        main()
    assert loaded == ["Mine"]


def test_a_mistake_ends_the_process_without_a_traceback():
    result = run("align", str(RECIPE), "training.loss.bta=1")
    assert result.returncode == 2
    assert "did you mean 'beta'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("it is said"), 2),
        (RunLocked("it is said"), 2),
        (DataError("it is said"), 3),
        (CorruptArtifact("it is said"), 3),
        (Diverged("it is said"), 4),
        (BudgetExceeded("it is said"), 1),
        (LogprobMismatch("it is said"), 1),
        (Stopped(), 143),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_an_error_has_the_exit_code_that_the_readme_says(
    error: BaseException,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def fail(arguments: list[str]) -> None:
        del arguments
        raise error

    monkeypatch.setattr("speechalign.cli.app", fail)
    monkeypatch.setattr("speechalign.cli.install_stop_handler", lambda: None)
    monkeypatch.setattr(sys, "argv", ["speechalign", "align", "a recipe.yaml"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    said = capsys.readouterr().err
    if isinstance(error, Stopped):
        assert "the same command resumes: speechalign align 'a recipe.yaml'" in said
    else:
        assert said == "speechalign: it is said\n"


@pytest.mark.parametrize(
    ("verb", "stage"),
    [
        ("sample", "samples"),
        ("judge", "scored"),
        ("pair", "pairs"),
        ("train", "policy"),
        ("evaluate", "evaluation"),
        ("align", "report"),
    ],
)
def test_a_verb_runs_until_its_own_stage(
    verb: str,
    stage: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def run_align(config: AlignConfig, *, until: str) -> Outcome:
        return Outcome(text=f"{until} with seed {config.seed}", folder=config.run_dir)

    monkeypatch.setattr("speechalign.pipeline.align.run_align", run_align)
    monkeypatch.setattr("speechalign.cli.install_stop_handler", lambda: None)
    monkeypatch.setattr(sys, "argv", ["speechalign", verb, str(RECIPE), "seed=7"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"{stage} with seed 7\n"
