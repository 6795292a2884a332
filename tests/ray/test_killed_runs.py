"""A run that is killed in any stage finishes with the same command, with the same artifacts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from speechalign.config.align import AlignConfig
from speechalign.config.load import dump_yaml
from tests.ray.conftest import FinishedRun
from tests.tiny_stack import TinyStack, tiny_recipe

pytestmark = pytest.mark.ray

STAGES = ("iteration-1/scored", "iteration-1/policy", "iteration-1/evaluation")
SECONDS_INTO = 2.0
"""All stages take longer: to start actors or workers takes as long."""
ARTIFACTS = (
    "iteration-1/pairs/pairs.parquet",
    "iteration-1/policy/model.safetensors",
    "iteration-1/policy/vocabulary.json",
)


def start(config: AlignConfig, log: Path) -> subprocess.Popen[bytes]:
    recipe = config.run_dir.with_suffix(".yaml")
    recipe.write_text(dump_yaml(config))
    command = [sys.executable, "-m", "tests.ray.warm_workers.command", "speechalign"]
    with log.open("wb") as file:
        return subprocess.Popen(
            [*command, "align", str(recipe)],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def kill_in(stage: str, config: AlignConfig, log: Path) -> None:
    process = start(config, log)
    deadline = time.monotonic() + 240
    while f"{stage}: started" not in log.read_text():
        assert process.poll() is None, log.read_text()[-2000:]
        assert time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.2)
    time.sleep(SECONDS_INTO)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (config.run_dir / stage / "manifest.json").exists()


def finish(config: AlignConfig, log: Path) -> str:
    code = start(config, log).wait(timeout=400)
    assert code == 0, log.read_text()[-3000:]
    return log.read_text()


def hashes(run: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in ARTIFACTS:
        folder, _, file = name.rpartition("/")
        manifest = json.loads((run / folder / "manifest.json").read_text())
        found[name] = manifest["files"][file]["sha256"]
    return found


@pytest.mark.timeout(1200)
def test_a_run_killed_in_three_stages_ends_like_one_that_was_left_alone(
    stack: TinyStack, finished: FinishedRun, tmp_path: Path
):
    killed = tiny_recipe(stack, tmp_path / "killed")
    for stage in STAGES:
        kill_in(stage, killed, tmp_path / f"{stage.partition('/')[2]}.log")
    finished.start_from(killed, "ceiling", "reference")  # no iteration depends on them
    log = finish(killed, tmp_path / "last.log")
    assert "taking over from a run that died" in log
    assert "iteration-1/policy: finished earlier" in log
    assert hashes(killed.run_dir) == hashes(finished.folder)
    assert (killed.run_dir / "report.html").exists()
