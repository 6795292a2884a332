"""One process at a time makes an artifact; what a run's folder adds is in test_run_directory."""

import errno
import json
import threading
import time
from pathlib import Path

import pytest

from speechalign import locks
from speechalign.artifacts import write_json_atomically
from speechalign.config.prepare import PrepareConfig
from speechalign.config.training import SftArConfig
from speechalign.errors import ConfigError, RunLocked
from speechalign.locks import held, held_output
from speechalign.pipeline.prepare import run_prepare
from speechalign.training.sft import run_training

NUM_TAKERS = 6


def test_of_many_that_find_a_dead_lock_one_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lock = tmp_path / "lock"
    with held(tmp_path, lock):
        mine = json.loads(lock.read_text())
    lock.write_text(json.dumps(mine | {"pid": 2**22 + 1}))

    def write_slowly(path: Path, value: object) -> None:
        time.sleep(0.1)  # until all of them have seen that the lock is dead
        write_json_atomically(path, value)

    monkeypatch.setattr(locks, "write_json_atomically", write_slowly)
    at_once, over = (threading.Barrier(NUM_TAKERS, timeout=10.0) for _ in range(2))
    outcomes: list[str] = []

    def take() -> None:
        at_once.wait()
        try:
            with held(tmp_path, lock):
                outcomes.append("held")
                over.wait()
        except RunLocked:
            outcomes.append("refused")
            over.wait()

    threads = [threading.Thread(target=take) for _ in range(NUM_TAKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["held"] + ["refused"] * (NUM_TAKERS - 1)
    assert not lock.exists()


def test_a_process_of_the_same_number_that_started_later_is_another(tmp_path: Path):
    lock = tmp_path / "lock"
    with held(tmp_path, lock):
        mine = json.loads(lock.read_text())
    lock.write_text(json.dumps(mine | {"started": "1"}))
    with held(tmp_path, lock):
        assert json.loads(lock.read_text()) == mine


def test_who_lost_the_lock_leaves_it_to_the_winner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(locks, "HEARTBEAT_S", 0.01)
    lock = tmp_path / "lock"
    winner = json.dumps({"host": "elsewhere", "pid": 1})
    with held(tmp_path, lock):
        lock.write_text(winner)
        wait_for(caplog, "another run has taken over")
    assert lock.read_text() == winner


def test_a_heartbeat_that_fails_once_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(locks, "HEARTBEAT_S", 0.01)
    beats: list[Path] = []

    def touch(path: Path) -> None:
        beats.append(path)
        if len(beats) == 1:
            raise OSError(errno.ESTALE, "stale file handle")

    monkeypatch.setattr(Path, "touch", touch)
    with held(tmp_path, tmp_path / "lock"):
        wait_for(caplog, "no heartbeat")
        deadline = time.monotonic() + 10.0
        while len(beats) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert len(beats) > 1


def wait_for(caplog: pytest.LogCaptureFixture, words: str) -> None:
    deadline = time.monotonic() + 10.0
    while words not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.01)
    assert words in caplog.text


def test_an_output_that_another_process_makes_is_left_alone(tmp_path: Path):
    output = tmp_path / "new" / "output"
    training = SftArConfig.model_validate({"golden": "g.parquet", "output": output, "num_steps": 1})
    source = {"kind": "manifest", "path": "m.jsonl"}
    preparation = PrepareConfig.model_validate({"input": source, "output": output})
    with held_output(output):
        with pytest.raises(RunLocked, match="output is held by process"):
            run_training(training)
        with pytest.raises(RunLocked, match="output is held by process"):
            run_prepare(preparation)
    assert list(output.parent.iterdir()) == []


def test_an_output_below_a_file_is_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match=r"file/new cannot be written \(Not a directory\)"),
        held_output(tmp_path / "file" / "new" / "output"),
    ):
        pass
