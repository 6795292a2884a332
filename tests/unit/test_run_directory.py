import json
import os
from pathlib import Path

import pytest
from pydantic import Field

from speechalign.artifacts import committed_folder
from speechalign.config.base import Config
from speechalign.errors import ConfigError, CorruptArtifact, DataError, RunLocked
from speechalign.pipeline.run_directory import open_run


class Told(Config):
    beta: float = Field(default=0.1)


def write_number(folder: Path) -> None:
    with committed_folder(folder, {}) as partial:
        (partial / "number").write_text("7")


def test_a_finished_stage_is_never_redone(tmp_path: Path):
    calls: list[int] = []

    def produce(folder: Path) -> None:
        calls.append(1)
        write_number(folder)

    for _ in range(2):
        with open_run(tmp_path / "run", Told()) as run:
            run.stage("iteration-1/pairs", produce)
    number = tmp_path / "run" / "iteration-1" / "pairs" / "number"
    assert (len(calls), number.read_text()) == (1, "7")


def test_a_half_written_stage_leaves_nothing_that_looks_finished(tmp_path: Path):
    def die(folder: Path) -> None:
        with committed_folder(folder, {}) as partial:
            (partial / "number").write_text("7")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError), open_run(tmp_path, Told()) as run:
        run.stage("pairs", die)
    with open_run(tmp_path, Told()) as run:
        assert not (tmp_path / "pairs").exists()
        run.stage("pairs", write_number)
    assert (tmp_path / "pairs" / "manifest.json").exists()


def test_a_stage_that_commits_nothing_is_not_finished(tmp_path: Path):
    with open_run(tmp_path, Told()) as run, pytest.raises(DataError, match="no manifest"):
        run.stage("pairs", lambda folder: folder.mkdir())


def test_a_flipped_bit_in_a_finished_stage_is_noticed(tmp_path: Path):
    with open_run(tmp_path, Told()) as run:
        folder = run.stage("pairs", write_number)
        (folder / "number").write_text("8")
        with pytest.raises(CorruptArtifact, match="differs from its manifest"):
            run.stage("pairs", write_number)


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path):
    refused = pytest.raises(RunLocked, match=f"process {os.getpid()}")
    with open_run(tmp_path, Told()), refused, open_run(tmp_path, Told()):
        pass


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path):
    with open_run(tmp_path, Told()):
        mine = json.loads((tmp_path / "lock").read_text())
    (tmp_path / "lock").write_text(json.dumps(mine | {"pid": 2**22 + 1}))
    with open_run(tmp_path, Told()):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "lock").exists()


def test_the_fresh_lock_of_another_host_is_respected(tmp_path: Path):
    (tmp_path / "lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "job_id": ""}))
    with pytest.raises(RunLocked, match="elsewhere"), open_run(tmp_path, Told()):
        pass


def test_the_silent_lock_of_another_host_is_taken_over(tmp_path: Path):
    lock = tmp_path / "lock"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "job_id": ""}))
    os.utime(lock, (0, 0))
    with open_run(tmp_path, Told()):
        pass


def test_after_a_reboot_a_process_of_the_same_number_does_not_hold_the_lock(tmp_path: Path):
    lock = tmp_path / "lock"
    with open_run(tmp_path, Told()):
        before = json.loads(lock.read_text()) | {"processes": "another boot"}
    lock.write_text(json.dumps(before))
    with pytest.raises(RunLocked), open_run(tmp_path, Told()):  # or in another container
        pass
    os.utime(lock, (0, 0))
    with open_run(tmp_path, Told()):
        pass


def test_another_config_is_refused_with_what_changed(tmp_path: Path):
    with open_run(tmp_path, Told()) as run:
        run.stage("pairs", write_number)
    refused = pytest.raises(ConfigError, match=r"beta: was 0\.1, now 0\.2")
    with refused, open_run(tmp_path, Told(beta=0.2)):
        pass


def test_a_config_with_which_nothing_was_made_may_be_mended(tmp_path: Path):
    for beta in (0.1, 0.2):
        with open_run(tmp_path, Told(beta=beta)):
            pass
    assert "beta: 0.2" in (tmp_path / "config.yaml").read_text()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    refused = pytest.raises(ConfigError, match="cannot be written")
    with refused, open_run(tmp_path / "file" / "run", Told()):
        pass
