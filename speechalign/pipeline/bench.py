"""`speechalign bench serve`: an endpoint under load, one that dies, and the engine without it."""

import asyncio
import json
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from speechalign.config.serving import APPLICATION, ServingConfig, speaker_name
from speechalign.pipeline.cluster import LOCAL_ENVIRONMENT
from speechalign.pipeline.serve import Endpoint, deployed

PCM_WARM_UP_S = 5.0


def bench_serve(endpoint: Endpoint, *, num_clients: int, seconds: float) -> dict[str, Any]:
    """Measure one client, many, a killed replica, and many callers of the same engine in-process.

    Args:
        endpoint: it is started for the measurement, and ends with it.
        num_clients: at once, where there are many.
        seconds: of each measurement.
    """
    with deployed(endpoint) as address:
        alone = asyncio.run(_over_http(endpoint, address, 1, seconds))
        crowd = asyncio.run(_over_http(endpoint, address, num_clients, seconds))
        died = asyncio.run(_killed(endpoint, address))
    direct = _direct(endpoint.config, num_clients, seconds)
    served_s, direct_s = (one["speech_seconds_a_second"] for one in (crowd, direct))
    return {
        "one client": alone,
        f"{num_clients} clients": crowd,
        "the policy's replica killed": died,
        f"{num_clients} callers of the engine, no HTTP, no Serve": direct,
        "throughput of the endpoint, of the engine's": round(served_s / direct_s, 3),
    }


async def _over_http(
    endpoint: Endpoint, address: str, num_clients: int, seconds: float
) -> dict[str, Any]:
    from speechalign.serving.bench import load, over_http, summary

    async with _clients(endpoint, address, num_clients) as client:
        speak = over_http(client, *_model_and_voice(endpoint.config))
        rate_hz = endpoint.config.pcm_sample_rate_hz
        await load(speak, num_clients=num_clients, seconds=PCM_WARM_UP_S, rate_hz=rate_hz)
        tally = await load(speak, num_clients=num_clients, seconds=seconds, rate_hz=rate_hz)
    return summary(tally)


async def _killed(endpoint: Endpoint, address: str) -> dict[str, Any]:
    from speechalign.serving.bench import outage, over_http

    model, voice = _model_and_voice(endpoint.config)
    async with _clients(endpoint, address, 1) as client:
        return await outage(over_http(client, model, voice), replica_of(speaker_name(model)).kill)


@asynccontextmanager
async def _clients(
    endpoint: Endpoint, address: str, num_clients: int
) -> AsyncGenerator[httpx.AsyncClient]:
    from speechalign.serving.keys import read_keys

    keys = read_keys(endpoint.config.access)
    headers = {"Authorization": f"Bearer {keys[0].key}"} if keys else {}
    limits = httpx.Limits(max_connections=num_clients)
    async with httpx.AsyncClient(
        base_url=address, headers=headers, timeout=120, limits=limits
    ) as client:
        yield client


def replica_of(deployment: str) -> psutil.Process:
    """Return the one replica of a deployment that this process started; others may be here."""
    ours = psutil.Process().children(recursive=True)
    name = f"ServeReplica:{APPLICATION}:{deployment}"
    (found,) = [one for one in ours if name in " ".join(one.cmdline())]
    return found


def _direct(config: ServingConfig, num_clients: int, seconds: float) -> dict[str, Any]:
    for name, value in LOCAL_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from speechalign.serving.bench import in_process, load, summary
    from speechalign.serving.renderer import VoiceRenderer
    from speechalign.serving.service import SpeechService
    from speechalign.serving.speaker import PolicySpeaker
    from speechalign.serving.telemetry import Telemetry

    model, voice = _model_and_voice(config)

    async def run() -> dict[str, Any]:
        speaker = PolicySpeaker(config)
        await speaker.reconfigure(config.policies[model].model_dump(mode="json"))
        service = SpeechService(config, {model: speaker}, VoiceRenderer(config), Telemetry())
        speak = in_process(service, model, voice)
        rate_hz = config.pcm_sample_rate_hz
        await load(speak, num_clients=num_clients, seconds=PCM_WARM_UP_S, rate_hz=rate_hz)
        return summary(await load(speak, num_clients=num_clients, seconds=seconds, rate_hz=rate_hz))

    return asyncio.run(run())


def _model_and_voice(config: ServingConfig) -> tuple[str, str]:
    from speechalign.serving.voices import golden_voices

    return next(iter(config.policies)), next(iter(golden_voices(config.voices)))


def write_bench(result: dict[str, Any], output: Path | None) -> str:
    """Return the result as JSON; write it, too."""
    text = json.dumps(result, indent=2)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n")
    return text
