"""How fast an endpoint speaks, as many clients see it, and what HTTP and Serve cost.

Closed loop: each client asks again as soon as its last answer ended. A client's player is taken
to start with the first sound; an underrun is a moment at which it has nothing left to play.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import httpx
import numpy as np
import psutil

from speechalign.serving.keys import ANONYMOUS
from speechalign.serving.problems import Problem
from speechalign.serving.schema import SpeechRequest
from speechalign.serving.service import SpeechService

LINES = (
    "The harbour was quiet in the morning.",
    "Please bring the small table into the garden.",
    "We waited an hour for the last train home.",
    "Nobody remembers who painted the old bridge.",
    "It rained all night, but the road stayed open.",
    "Her letter arrived two weeks after the holiday.",
)
BYTES_PER_SAMPLE = 2
PROCESSES = "ServeReplica:"
GIVE_UP_S = 300.0

Stream: TypeAlias = AsyncGenerator[bytes]
Speak: TypeAlias = Callable[[str, int], Stream]
"""A text and a seed to 16-bit PCM, as it comes."""


class Refused(Exception):
    """An answer that is no speech."""

    def __init__(self, status: int) -> None:
        super().__init__(str(status))
        self.status = status


@dataclass(slots=True)
class Tally:
    """What all clients saw."""

    first_s: list[float] = field(default_factory=list[float])
    factors: list[float] = field(default_factory=list[float])
    """Seconds from request to end, a second of speech."""
    underruns: int = 0
    spoken_s: float = 0.0
    wall_s: float = 0.0
    statuses: Counter[int] = field(default_factory=Counter[int])
    broken: int = 0
    """Streams that ended in the middle."""
    memory_mib: list[float] = field(default_factory=list[float])


async def load(speak: Speak, *, num_clients: int, seconds: float, rate_hz: int) -> Tally:
    """Let clients ask until the time is over; started answers are finished."""
    # In a thread: to look at all processes may take longer than a client's whole answer.
    tally = Tally(memory_mib=[await asyncio.to_thread(_memory_mib)])
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        turn = number
        while time.monotonic() < end:
            try:
                await _listen(speak(LINES[turn % len(LINES)], turn), tally, rate_hz)
            except Refused as error:
                tally.statuses[error.status] += 1
                await asyncio.sleep(0.5)
            except httpx.HTTPError:
                tally.broken += 1
            turn += num_clients

    async def watch() -> None:
        while True:
            await asyncio.sleep(2)
            tally.memory_mib.append(await asyncio.to_thread(_memory_mib))

    watcher = asyncio.create_task(watch())
    started = time.monotonic()
    await asyncio.gather(*map(client, range(num_clients)))
    watcher.cancel()
    tally.wall_s = time.monotonic() - started
    return tally


async def _listen(stream: Stream, tally: Tally, rate_hz: int) -> None:
    started, first, num_bytes, ran_dry = time.monotonic(), 0.0, 0, 0
    async with aclosing(stream) as chunks:
        async for chunk in chunks:
            now = time.monotonic()
            played_s = now - started - first
            if num_bytes and num_bytes / BYTES_PER_SAMPLE / rate_hz < played_s:
                ran_dry += 1
            first = first or now - started
            num_bytes += len(chunk)
    spoken_s = num_bytes / BYTES_PER_SAMPLE / rate_hz
    tally.statuses[200] += 1
    tally.first_s.append(first)
    tally.factors.append((time.monotonic() - started) / spoken_s)
    tally.underruns += bool(ran_dry)
    tally.spoken_s += spoken_s


async def outage(speak: Speak, kill: Callable[[], None]) -> dict[str, Any]:
    """Kill who speaks while somebody listens, and ask again until somebody is answered.

    The seconds count from the kill to the first sound of the next answer; null when there was
    none within five minutes.
    """
    broken, statuses, started = 0, Counter[int](), 0.0
    try:
        async with aclosing(speak(" ".join(LINES), 0)) as stream:
            await anext(stream)
            started = time.monotonic()
            kill()
            async for _ in stream:
                pass
    except httpx.HTTPError:
        broken = 1
    while time.monotonic() - started < GIVE_UP_S:
        try:
            async with aclosing(speak(LINES[1], 1)) as stream:
                await anext(stream)
            statuses[200] += 1
            break
        except Refused as error:
            statuses[error.status] += 1
        except httpx.HTTPError:
            statuses[0] += 1
        await asyncio.sleep(0.2)
    waited_s = round(time.monotonic() - started, 1) if statuses[200] else None
    return {
        "broken_streams": broken,
        "answers": dict(sorted(statuses.items())),
        "seconds_to_next_sound": waited_s,
    }


def over_http(client: httpx.AsyncClient, model: str, voice: str) -> Speak:
    """Return an endpoint's speech, raw PCM."""

    async def speak(text: str, seed: int) -> Stream:
        body = {"model": model, "voice": voice, "input": text, "seed": seed,
                "response_format": "pcm"}  # fmt: skip
        async with client.stream("POST", "/v1/audio/speech", json=body) as answer:
            if answer.status_code != 200:
                raise Refused(answer.status_code)
            async for chunk in answer.aiter_raw():
                yield chunk

    return speak


def in_process(service: SpeechService, model: str, voice: str) -> Speak:
    """Return the same engine's and renderer's speech without HTTP and Serve."""

    async def speak(text: str, seed: int) -> Stream:
        asked = SpeechRequest(
            model=model, voice=voice, input=text, seed=seed, response_format="pcm"
        )
        try:
            order = await service.order(asked, ANONYMOUS)
            async with aclosing(service.audio(order)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except Problem as problem:
            raise Refused(problem.status) from problem

    return speak


def summary(tally: Tally) -> dict[str, Any]:
    """Return the figures, times in milliseconds."""
    first_ms = [1000 * value for value in tally.first_s]
    memory = tally.memory_mib
    return {
        "answers": dict(sorted(tally.statuses.items())),
        "broken_streams": tally.broken,
        "first_sound_ms": _percentiles(first_ms),
        "real_time_factor": _percentiles(tally.factors),
        "answers_with_underruns": tally.underruns,
        "speech_seconds_a_second": round(tally.spoken_s / tally.wall_s, 3),
        "replica_memory_mib": {"first": round(memory[0]), "last": round(memory[-1])},
    }


def _percentiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {f"p{rank}": round(float(np.percentile(values, rank)), 3) for rank in (50, 95, 99)}


def _memory_mib() -> float:
    """Return the resident memory of this machine's Serve replicas."""
    total = 0
    for process in psutil.process_iter(["cmdline", "memory_info"]):
        if PROCESSES in " ".join(process.info["cmdline"] or []) and process.info["memory_info"]:
            total += process.info["memory_info"].rss
    return total / 2**20
