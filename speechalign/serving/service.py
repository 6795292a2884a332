"""What the endpoint does with a request that was let in: text to sentences to sound to bytes."""

import asyncio
import base64
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from speechalign.config.serving import ServingConfig
from speechalign.errors import ConfigError, DataError, UnspeakableText
from speechalign.policy.text import TextFrontend
from speechalign.seeds import derive_seed
from speechalign.serving.encoding import Tempo, build_encoder, is_sent_whole, media_type
from speechalign.serving.keys import ApiKey
from speechalign.serving.problems import Problem, closing, failed, invalid, too_many, unknown_model
from speechalign.serving.schema import SpeechRequest
from speechalign.serving.sentence import Renderer, Sentence, Speaker
from speechalign.serving.speaker import Ask
from speechalign.serving.telemetry import Telemetry
from speechalign.serving.text import sentences
from speechalign.serving.voices import Voice, Voices

logger = logging.getLogger(__name__)

AnswerT = TypeVar("AnswerT")


class PolicyFace(Speaker, Protocol):
    """A policy's deployment, as the ingress sees it."""

    async def facts(self) -> Mapping[str, Any]:
        """Return what `PolicySpeaker.facts` does."""
        ...


class RendererFace(Renderer, Protocol):
    """The renderer's deployment, as the ingress sees it."""

    async def sample_rate_hz(self) -> int:
        """Return the rate of all waveforms."""
        ...

    async def encode(self, clip: bytes) -> tuple[NDArray[np.int16], str]:
        """Return codes_KT of a clip and the codec's fingerprint."""
        ...


@dataclass(slots=True)
class Tally:
    """What was spoken of an order so far."""

    num_frames: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A request that can be spoken."""

    request: SpeechRequest
    speaker: PolicyFace
    policy_version: int
    voice: Voice
    phonemes: tuple[str, ...]
    """One text a sentence."""
    seed: int
    sample_rate_hz: int
    tally: Tally


class SpeechService:
    """Everything but HTTP."""

    def __init__(
        self,
        config: ServingConfig,
        policies: Mapping[str, PolicyFace],
        renderer: RendererFace,
        telemetry: Telemetry,
    ) -> None:
        self.config = config
        self.voices = Voices(config.voices)
        self._policies, self._renderer, self._telemetry = policies, renderer, telemetry
        self._frontend = TextFrontend()
        self._num_streams, self._num_waiting, self._is_draining = 0, 0, False
        self._sample_rate_hz = 0

    async def models(self) -> dict[str, Mapping[str, Any]]:
        """Return the facts of each policy.

        Raises:
            TimeoutError: one of them does not answer.
        """
        asked = [policy.facts() for policy in self._policies.values()]
        facts = await self._in_time(asyncio.gather(*asked))
        return dict(zip(self._policies, facts, strict=True))

    async def order(self, request: SpeechRequest, key: ApiKey) -> Order:
        """Return what is to be spoken, checked so that nothing but a failure can stop it.

        Raises:
            Problem: 400 or 404, with the field that cannot be served.
            TimeoutError: the policy or the renderer does not answer.
        """
        most = key.max_input_characters or self.config.limits.max_input_characters
        if len(request.input) > most:
            raise invalid(
                f"input has {len(request.input)} characters, at most {most} are spoken",
                "input",
                "input_too_long",
            )
        speaker, facts = await self._policy(request.model)
        if request.n_best > 1:
            self._check_choice(request, facts)
        voice = self.voices.find(request.voice_name)
        if voice is None:
            raise invalid(
                "there is no such voice; GET /v1/audio/voices lists them", "voice", "unknown_voice"
            )
        if voice.codec_fingerprint != facts["codec_fingerprint"]:
            raise invalid(
                "this voice was made with another codec than the model's; upload it again",
                "voice",
                "voice_of_another_codec",
            )
        return Order(
            request=request,
            speaker=speaker,
            policy_version=facts["version"],
            voice=voice,
            phonemes=self._phonemes(request.input, facts["max_phonemes"]),
            seed=secrets.randbits(31) if request.seed is None else request.seed,
            sample_rate_hz=self._sample_rate_hz or await self._ask_rate(),
            tally=Tally(),
        )

    async def _ask_rate(self) -> int:
        self._sample_rate_hz = await self._in_time(self._renderer.sample_rate_hz())
        return self._sample_rate_hz

    async def _in_time(self, answer: Awaitable[AnswerT]) -> AnswerT:
        """Return an answer of another process, unless it takes too long.

        When a replica died and no other can be placed, Serve's handle waits for ever.
        """
        async with asyncio.timeout(self.config.streaming.piece_timeout_s):
            return await answer

    async def _policy(self, model: str) -> tuple[PolicyFace, Mapping[str, Any]]:
        name, _, version = model.partition("@")
        if name not in self._policies:
            raise unknown_model(model, list(self._policies))
        facts = await self._in_time(self._policies[name].facts())
        if version and version != str(facts["version"]):
            raise unknown_model(model, [f"{name}@{facts['version']}"])
        return self._policies[name], facts

    def _check_choice(self, request: SpeechRequest, facts: Mapping[str, Any]) -> None:
        most = self.config.speaking.max_n_best
        if not facts["can_choose"]:
            raise invalid(
                "this model has no reward model, so n_best must be 1", "n_best", "no_reward_model"
            )
        if request.n_best > most:
            raise invalid(f"n_best is at most {most}", "n_best", "invalid_value")

    def _phonemes(self, text: str, most: int) -> tuple[str, ...]:
        try:
            parts = sentences(text, self.config.speaking.max_sentence_characters)
            spoken = tuple(self._frontend.phonemize(part) for part in parts)
        except UnspeakableText as error:
            raise invalid(str(error), "input", "unspeakable_text") from None
        for part, phonemes in zip(parts, spoken, strict=True):
            if len(phonemes) > most:
                raise invalid(
                    f"{part!r} has {len(phonemes)} sounds, at most {most} are spoken at once; "
                    "write its numbers shorter, or make several sentences of it",
                    "input",
                    "input_too_long",
                )
        return spoken

    def media_type(self, order: Order) -> str:
        """Return the Content-Type of an answer."""
        if order.request.stream_format == "sse":
            return "text/event-stream"
        return media_type(order.request.response_format, self.config.pcm_sample_rate_hz)

    @asynccontextmanager
    async def slot(self) -> AsyncGenerator[None]:
        """Hold one of the streams that this replica serves at once.

        Raises:
            Problem: 429 when all are taken, 503 when the endpoint is about to end.
        """
        limits = self.config.limits
        if self._is_draining:
            raise closing(limits.retry_after_s)
        if self._num_streams >= limits.max_streams:
            raise too_many(
                f"{limits.max_streams} streams are open; come back in {limits.retry_after_s} s",
                "overloaded",
                limits.retry_after_s,
            )
        self._num_streams += 1
        self._telemetry.streams.set(self._num_streams)
        try:
            yield
        finally:
            self._num_streams -= 1
            self._telemetry.streams.set(self._num_streams)

    async def drain(self) -> None:
        """Refuse new streams, and return when the open ones have ended or `drain_s` is over."""
        self._is_draining = True
        end = time.monotonic() + self.config.drain_s
        while self._is_draining and self._num_streams and time.monotonic() < end:
            await asyncio.sleep(0.05)

    def reopen(self) -> None:
        """Let new streams in again: the endpoint was told to end, and then to go on."""
        self._is_draining = False

    async def audio(self, order: Order) -> AsyncGenerator[bytes]:
        """Yield the bytes of the answer, none of them empty.

        Raises:
            Problem: 500 when the policy said nothing of a sentence.
            TimeoutError: it was silent for too long.
            Exception: what the engine raised otherwise.
        """
        request = order.request
        encoder = build_encoder(
            request.response_format,
            order.sample_rate_hz,
            pcm_sample_rate_hz=self.config.pcm_sample_rate_hz,
            whole=is_sent_whole(request.response_format, request.stream),
        )
        tempo = Tempo(request.speed, order.sample_rate_hz)
        async with aclosing(self._measured(order)) as waves:
            async for wave_N in waves:
                chunk = await asyncio.to_thread(encoder.encode, tempo.change(wave_N))
                if chunk:
                    yield chunk
        rest_N = tempo.change(np.zeros(0, np.float32), is_last=True)
        rest = encoder.encode(rest_N) + encoder.finish()
        if rest:
            yield rest

    async def events(self, order: Order) -> AsyncGenerator[bytes]:
        """Yield server-sent events: `speech.audio.delta`, then `speech.audio.done`.

        A failure after the first one can only be told by an event, `speech.audio.error`.
        """
        num_bytes = 0
        try:
            async with aclosing(self.audio(order)) as chunks:
                async for chunk in chunks:
                    num_bytes += len(chunk)
                    audio = base64.b64encode(chunk).decode()
                    yield _event({"type": "speech.audio.delta", "audio": audio})
        except Exception as error:  # whatever it was, the client must hear of it
            if not num_bytes:
                raise
            problem = as_problem(error)
            yield _event({"type": "speech.audio.error"} | problem.to_json())
            return
        tokens = sum(len(text) for text in order.phonemes)
        usage = {
            "input_tokens": tokens,
            "output_tokens": order.tally.num_frames,
            "total_tokens": tokens + order.tally.num_frames,
        }
        yield _event({"type": "speech.audio.done", "usage": usage})

    async def _measured(self, order: Order) -> AsyncGenerator[NDArray[np.float32]]:
        tags = {"model": order.request.model.partition("@")[0]}
        started, num_samples, end = time.perf_counter(), 0, "cancelled"
        self._count_waiting(1)
        try:
            async with aclosing(self._waves(order, tags)) as waves:
                async for wave_N in waves:
                    if not num_samples:
                        self._count_waiting(-1)
                        waited_s = time.perf_counter() - started
                        self._telemetry.first_audio.observe(waited_s, tags=tags)
                    num_samples += len(wave_N)
                    yield wave_N
            end = "done"
        except Exception:
            end = "failed"
            raise
        finally:
            spoken_s = num_samples / order.sample_rate_hz
            if spoken_s:
                factor = (time.perf_counter() - started) / spoken_s
                self._telemetry.real_time.observe(factor, tags=tags)
                self._telemetry.audio.inc(spoken_s, tags=tags)
            else:
                self._count_waiting(-1)
            self._telemetry.ends.inc(tags=tags | {"end": end})

    def _count_waiting(self, change: int) -> None:
        self._num_waiting += change
        self._telemetry.queue.set(self._num_waiting)

    async def _waves(
        self, order: Order, tags: dict[str, str]
    ) -> AsyncGenerator[NDArray[np.float32]]:
        """Yield all sentences; while one is heard the next one is spoken.

        Raises:
            Problem: the policy said nothing of a sentence; what is left would be another text.
        """
        pause_N = np.zeros(round(self.config.streaming.pause_s * order.sample_rate_hz), np.float32)
        spoken = [self._sentence(order, 0)]
        try:
            for number in range(len(order.phonemes)):
                if number + 1 < len(order.phonemes):
                    spoken.append(self._sentence(order, number + 1))
                async with aclosing(spoken[number].waves()) as waves:
                    async for wave_N in waves:
                        yield wave_N
                order.tally.num_frames += spoken[number].num_frames
                if spoken[number].is_truncated:
                    self._telemetry.truncated.inc(tags=tags)
                if not spoken[number].num_frames:
                    raise failed("no_speech", "the policy said nothing; try another seed or text")
                if number + 1 < len(order.phonemes) and len(pause_N):
                    yield pause_N
        finally:
            for sentence in spoken:
                await sentence.close()

    def _sentence(self, order: Order, number: int) -> Sentence:
        ask = Ask(
            phonemes=order.phonemes[number],
            voice_codes_KT=order.voice.codes_KT,
            codec_fingerprint=order.voice.codec_fingerprint,
            seed=derive_seed(order.seed, "serving", number),
            n_best=order.request.n_best,
            version=order.policy_version if "@" in order.request.model else None,
        )
        return Sentence(order.speaker, self._renderer, ask, self.config.streaming)

    async def upload(self, name: str, clip: bytes) -> Voice:
        """Make a voice of a clip.

        Raises:
            Problem: 400 or 409, saying why the clip or the name cannot be taken.
            TimeoutError: the renderer does not answer.
        """
        reason = self.voices.can_take(name)
        if reason:
            raise invalid(reason, "name", "voice_exists", 409)
        try:
            codes_KT, fingerprint = await self._in_time(self._renderer.encode(clip))
        except DataError as error:
            # Of another process comes an error whose text is Ray's traceback; its cause is ours.
            reason = str(getattr(error, "cause", error))
            raise invalid(reason, "audio_sample", "unusable_clip") from None
        if codes_KT.shape[1] < self.config.voices.speaker_frames:
            raise invalid(
                "the clip has too little speech between its silent ends",
                "audio_sample",
                "unusable_clip",
            )
        try:
            return await asyncio.to_thread(self.voices.store, name, codes_KT, fingerprint)
        except ConfigError as error:  # another upload of that name was faster
            raise invalid(str(error), "name", "voice_exists", 409) from None


def as_problem(error: BaseException) -> Problem:
    """Return what a client is told of a failure; the rest is for the log."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, TimeoutError):
        return failed("timeout", "the engine did not answer in time; try again", 504)
    return failed("engine_failed", "the engine failed while it spoke; try again")


def _event(values: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(values)}\n\n".encode()
