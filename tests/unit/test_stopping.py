"""SIGTERM: what is asked to save, and what ends at once."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from speechalign.artifacts import manifest_facts
from speechalign.config.policy import ArConfig
from speechalign.config.training import EngineConfig, SftArConfig, WorkersConfig
from speechalign.errors import Stopped
from speechalign.training import stopping
from speechalign.training.metrics import read_metrics
from speechalign.training.sft import train_worker, work_folder
from speechalign.training.stopping import (
    STOP_REQUEST,
    handlers_kept,
    install_stop_handler,
    saved_when_stopped,
    seconds_to_save,
)
from tests.online_toy import a_process_group
from tests.tiny_stack import build_tiny_stack


@pytest.fixture(autouse=True)
def handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(stopping._Asked, "is_stopping", False)  # pyright: ignore[reportPrivateUsage]
    with handlers_kept():
        install_stop_handler()
        yield


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)


def test_the_handlers_of_before_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with handlers_kept():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) == before


def test_outside_of_a_training_the_process_ends_at_once_and_only_once():
    with pytest.raises(Stopped):
        sigterm()
    sigterm()


def test_a_training_is_asked_and_then_the_process_ends(tmp_path: Path):
    request = tmp_path / "work" / "stop-request"
    has_saved = False
    with pytest.raises(Stopped), saved_when_stopped(request):
        assert not request.exists()
        sigterm()
        sigterm()
        assert request.exists()
        has_saved = True
    assert has_saved
    assert not request.exists()


def test_a_training_that_fails_while_it_saves_is_a_stop_and_before_it_is_a_failure(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), saved_when_stopped(tmp_path / "request"):
        _ = 1 / 0
    with pytest.raises(Stopped), saved_when_stopped(tmp_path / "request"):
        sigterm()
        _ = 1 / 0


def test_a_training_that_does_not_save_in_time_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "0.2")
    started_s = time.monotonic()
    with pytest.raises(Stopped), saved_when_stopped(tmp_path / "request"):
        sigterm()
        time.sleep(30)
    assert time.monotonic() - started_s < 10


def test_a_request_of_a_former_life_stops_nothing(tmp_path: Path):
    (tmp_path / "request").touch()
    with saved_when_stopped(tmp_path / "request"):
        assert not (tmp_path / "request").exists()


def test_saving_may_take_a_share_of_what_the_job_was_given(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_JOB_STOP_WAIT_TIME_S", raising=False)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert seconds_to_save() == 22.5
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert seconds_to_save() == 2.25
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "120")
    assert seconds_to_save() == 90.0


@pytest.mark.filterwarnings("ignore")
def test_supervised_training_saves_when_it_is_asked_and_goes_on(tmp_path: Path):
    stack = build_tiny_stack(tmp_path / "stack")
    config = SftArConfig(
        golden=stack.golden,
        output=tmp_path / "ar",
        num_steps=3,
        rows_per_step=4,
        num_heldout=4,
        log_every=1,
        model=ArConfig(num_layers=1, hidden_size=16, num_heads=1, prefix_frames=4),
        engine=EngineConfig(zero_stage=0),
        workers=WorkersConfig(num_workers=1),
    )
    work = work_folder(config)
    work.mkdir()
    (work / STOP_REQUEST).touch()
    with a_process_group():
        with pytest.raises(Stopped):
            train_worker({"config": config.model_dump(mode="json")})
        assert manifest_facts(work / "checkpoint")["step_index"] == 1
        (work / STOP_REQUEST).unlink()
        train_worker({"config": config.model_dump(mode="json")})
    steps = [row["step"] for row in read_metrics(work / "metrics.jsonl") if "loss" in row]
    assert steps == [1, 2, 3]
    assert manifest_facts(config.output)["num_steps"] == 3
