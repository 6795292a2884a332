"""The Serve application: ingress -> a speaker for each policy -> renderer.

    applications: [{name: speechalign, import_path: speechalign.serving.app:build, args: {...}}]

`args` is a `ServingConfig`. A policy is swapped without a new process by the `user_config` of its
deployment, `speaker-NAME`; Serve calls `PolicySpeaker.reconfigure` in every replica.
"""

from collections.abc import AsyncGenerator, Mapping
from typing import Any, TypeAlias

import numpy as np
from fastapi import FastAPI
from numpy.typing import NDArray
from ray import serve
from ray.serve import Application

from speechalign.artifacts import manifest_facts
from speechalign.codec.base import check_fingerprint
from speechalign.codec.build import build_codec
from speechalign.config.load import validated
from speechalign.config.serving import (
    INGRESS,
    RENDERER,
    ReplicasConfig,
    ServingConfig,
    speaker_name,
)
from speechalign.policy.ar import check_ar
from speechalign.policy.reward_model import load_reward_model
from speechalign.serving.api import build_api
from speechalign.serving.keys import Gate, read_keys
from speechalign.serving.memory import Memory
from speechalign.serving.renderer import VoiceRenderer
from speechalign.serving.service import SpeechService
from speechalign.serving.speaker import Ask, PolicySpeaker, Spoken
from speechalign.serving.telemetry import Telemetry
from speechalign.serving.voices import golden_voices
from speechalign.serving.windows import Heard, Window

Handle: TypeAlias = Any  # ray.serve's DeploymentHandle, whose types do not know streams


def build(args: Mapping[str, Any]) -> Application:
    """Return the application of a config; Serve calls it with the `args` of its file.

    Raises:
        ConfigError: the endpoint could never work: a wrong key, no API keys, a folder that holds
            no policy, parts of different codecs. Nothing was started yet.
    """
    config = validated(ServingConfig, args, "what the endpoint was told (args)")
    check_endpoint(config)
    speakers = {
        name: _deployment(PolicySpeaker, speaker_name(name), config.speaker_replicas, config)
        .options(user_config=policy.model_dump(mode="json"))
        .bind(config, Memory(speaker_name(name)))
        for name, policy in config.policies.items()
    }
    renderer = _deployment(VoiceRenderer, RENDERER, config.renderer_replicas, config).bind(config)
    ingress = _deployment(Ingress, INGRESS, config.ingress_replicas, config)
    return ingress.options(user_config={"is_draining": False}).bind(config, speakers, renderer)


def check_endpoint(config: ServingConfig) -> None:
    """Find what can be found before a process is started.

    Raises:
        ConfigError, DataError, CorruptArtifact: what is wrong and where.
    """
    read_keys(config.access)
    voices = golden_voices(config.voices)
    fingerprint = build_codec(config.codec).fingerprint
    for voice in voices.values():
        check_fingerprint(voice.codec_fingerprint, fingerprint, "the codec")
        break
    check_fingerprint(manifest_facts(config.nar)["codec_fingerprint"], fingerprint, "the codec")
    for policy in config.policies.values():
        facts = check_ar(policy.path)
        check_fingerprint(facts["codec_fingerprint"], fingerprint, "the codec")
        if policy.reward_model is not None:
            load_reward_model(policy.reward_model, codec_fingerprint=fingerprint)


def _deployment(cls: type[Any], name: str, replicas: ReplicasConfig, config: ServingConfig) -> Any:
    actor: dict[str, Any] = {"num_cpus": replicas.num_cpus, "num_gpus": replicas.num_gpus}
    if replicas.label_selector:
        actor["label_selector"] = replicas.label_selector
    scaling = replicas.model_dump(
        include={
            "min_replicas",
            "max_replicas",
            "target_ongoing_requests",
            "upscale_delay_s",
            "downscale_delay_s",
        }
    )
    return serve.deployment(
        cls,
        name=name,
        ray_actor_options=actor,
        autoscaling_config=scaling,
        max_ongoing_requests=replicas.max_ongoing_requests,
        graceful_shutdown_timeout_s=config.drain_s,
        health_check_period_s=2,
    )


class _Speaker:
    """A policy's deployment behind its handle."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle
        self._streaming = handle.options(stream=True)

    async def facts(self) -> Mapping[str, Any]:
        return await self._handle.facts.remote()

    async def speak(self, ask: Ask) -> AsyncGenerator[Spoken]:
        stream = self._streaming.speak.remote(ask)
        try:
            async for spoken in stream:
                yield spoken
        finally:
            stream.cancel()  # frees the engine's slot; nothing happens to a stream that ended


class _Renderer:
    """The renderer's deployment behind its handle."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    async def render(self, window: Window) -> tuple[NDArray[np.float32], Heard]:
        return await self._handle.render.remote(window)

    async def sample_rate_hz(self) -> int:
        return await self._handle.sample_rate_hz.remote()

    async def encode(self, clip: bytes) -> tuple[NDArray[np.int16], str]:
        return await self._handle.encode.remote(clip)


@serve.ingress()  # pyright: ignore[reportUntypedClassDecorator]
class Ingress:
    """The deployment that speaks HTTP."""

    def __init__(
        self,
        config: ServingConfig,
        speakers: Mapping[str, Handle],
        renderer: Handle,
    ) -> None:
        self._telemetry = Telemetry()
        policies = {name: _Speaker(handle) for name, handle in speakers.items()}
        self._service = SpeechService(config, policies, _Renderer(renderer), self._telemetry)
        self._gate = Gate(read_keys(config.access), config.limits)

    async def reconfigure(self, user_config: dict[str, bool]) -> None:
        """Let no new stream in and wait for the open ones, or let streams in again."""
        if user_config["is_draining"]:
            await self._service.drain()
        else:
            self._service.reopen()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application of this replica; Serve asks for it after the constructor."""
        return build_api(self._service, self._gate, self._telemetry)
