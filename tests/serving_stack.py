"""An endpoint in one process: the real policy, NAR model and codec, without Ray."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from speechalign.config.serving import ServingConfig
from speechalign.serving.api import build_api
from speechalign.serving.keys import ApiKey, Gate
from speechalign.serving.renderer import VoiceRenderer
from speechalign.serving.service import SpeechService
from speechalign.serving.speaker import PolicySpeaker
from speechalign.serving.telemetry import Telemetry

KEY = "a-key-for-the-tests"
AUTHORISED = {"Authorization": f"Bearer {KEY}"}
LINE = {"model": "base", "voice": "alloy", "input": "Good morning.", "seed": 1}


def serving_config(uploads: Path, **changes: Any) -> ServingConfig:
    """Return the endpoint of the embedded stack on the plain engine."""
    values: dict[str, Any] = {
        "nar": "speechalign/assets/nar",
        "policies": {"base": {"path": "speechalign/assets/ar"}},
        "engine": {"kind": "transformers"},
        "speaking": {"max_new_tokens": 150, "temperature": 0.7},
        "rendering": {"num_levels": 3},
        "streaming": {"piece_timeout_s": 120.0},  # 30 s were too few once, on a starved machine
        "voices": {
            "golden": "speechalign/assets/golden.parquet",
            "aliases": {"alloy": "hibari-h00"},
            "uploads": uploads,
        },
        "access": {"allow_anonymous": True},
        "limits": {"max_body_bytes": 40_000, "max_upload_bytes": 2_000_000},
    }
    return ServingConfig.model_validate(values | changes)


def build_service(config: ServingConfig) -> SpeechService:
    """Return the service with all its parts in this process."""
    speakers: dict[str, PolicySpeaker] = {}
    for name, policy in config.policies.items():
        speakers[name] = PolicySpeaker(config)
        asyncio.run(speakers[name].reconfigure(policy.model_dump(mode="json")))
    return SpeechService(config, speakers, VoiceRenderer(config), Telemetry())


@contextmanager
def client_of(service: SpeechService, *keys: ApiKey) -> Iterator[TestClient]:
    """Yield a client of the endpoint; without keys everybody is let in."""
    api = build_api(service, Gate(list(keys), service.config.limits), Telemetry())
    with TestClient(api, raise_server_exceptions=False) as client:
        yield client
