"""What the benchmark of the endpoint counts, on scripted answers."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator

import httpx
import pytest

from speechalign.serving.bench import Refused, Speak, Tally, load, outage, summary

RATE_HZ = 1000
SECOND = bytes(2 * RATE_HZ)


@pytest.fixture(autouse=True)
def _memory_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("speechalign.serving.bench._memory_mib", lambda: 0.0)


def script(*answers: list[bytes | float | Exception]) -> Speak:
    """Answer with one script after the other; the last is repeated. Numbers are seconds."""
    left = list(answers)

    async def speak(_text: str, _seed: int) -> AsyncGenerator[bytes]:
        answer = left.pop(0) if len(left) > 1 else left[0]
        for part in answer:
            if isinstance(part, bytes):
                yield part
            elif isinstance(part, Exception):
                raise part
            else:
                await asyncio.sleep(part)

    return speak


def measured(speak: Speak, num_clients: int = 1) -> Tally:
    return asyncio.run(load(speak, num_clients=num_clients, seconds=0.05, rate_hz=RATE_HZ))


def test_an_answer_counts_its_speech_its_first_sound_and_its_whole_time():
    tally = measured(script([0.1, SECOND, SECOND]))
    assert tally.statuses == Counter({200: 1})
    (first_s,), (factor,) = tally.first_s, tally.factors
    assert 0.1 <= first_s < 5
    assert first_s / 2 <= factor < 2.5
    assert tally.spoken_s == 2.0
    assert tally.wall_s >= first_s
    assert tally.underruns == 0


def test_the_rate_is_the_speech_of_all_clients_in_the_time_of_the_clock():
    tally = Tally(spoken_s=3.0, wall_s=2.0, memory_mib=[1.0])
    assert summary(tally)["speech_seconds_a_second"] == 1.5


def test_a_player_that_has_nothing_left_is_an_underrun_of_its_answer():
    tenth = SECOND[: len(SECOND) // 10]
    assert measured(script([0.1, tenth, 0.2, tenth])).underruns == 1
    assert measured(script([0.1, SECOND, 0.2, tenth])).underruns == 0


def test_refused_and_broken_answers_are_counted_apart_and_are_no_speech():
    tally = measured(script([Refused(429)]))
    assert (tally.statuses, tally.first_s) == (Counter({429: 1}), [])
    tally = measured(script([SECOND, 0.1, httpx.ReadError("gone")]))
    assert (tally.broken, tally.statuses) == (1, Counter())
    assert summary(tally)["first_sound_ms"] == {}


def test_every_client_asks_at_once():
    assert measured(script([0.1, SECOND]), num_clients=5).statuses == Counter({200: 5})


def test_clients_do_not_wait_while_the_memory_is_looked_at(monkeypatch: pytest.MonkeyPatch):
    threads: list[threading.Thread] = []

    def slow() -> float:
        threads.append(threading.current_thread())
        time.sleep(0.2)
        return 1.0

    monkeypatch.setattr("speechalign.serving.bench._memory_mib", slow)
    tally = measured(script([0.1, SECOND]))
    assert tally.statuses == Counter({200: 1})
    assert tally.memory_mib == [1.0]
    assert threading.main_thread() not in threads


def test_an_outage_lasts_from_the_kill_to_the_next_sound():
    killed: list[bool] = []
    gone = httpx.ReadError("gone")
    speak = script([SECOND, gone], [Refused(503)], [gone], [0.2, SECOND])
    seen = asyncio.run(outage(speak, lambda: killed.append(True)))
    assert killed == [True]
    assert seen["broken_streams"] == 1
    assert seen["answers"] == {0: 1, 200: 1, 503: 1}
    assert 0.6 <= seen["seconds_to_next_sound"] < 10


def test_a_stream_that_outlived_the_kill_and_an_end_without_sound_are_said(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("speechalign.serving.bench.GIVE_UP_S", 0.3)
    seen = asyncio.run(outage(script([SECOND, SECOND], [Refused(503)]), lambda: None))
    assert seen["broken_streams"] == 0
    assert seen["answers"].keys() == {503}
    assert seen["seconds_to_next_sound"] is None
