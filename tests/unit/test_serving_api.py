"""The contract of the speech API: every good request is spoken, every bad one refused exactly."""

import asyncio
import base64
import io
import json
import pickle
import shutil
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile as sf
import torch
from starlette.requests import Request
from starlette.testclient import TestClient
from starlette.types import Message

from speechalign.artifacts import committed_folder, manifest_facts
from speechalign.config.sampling import TransformersConfig
from speechalign.config.serving import ServingConfig
from speechalign.errors import ConfigError, DataError, EngineDead
from speechalign.generation.base import GenerationRequest, SamplingParams
from speechalign.generation.hf import TransformersEngine
from speechalign.policy.ar import load_ar
from speechalign.policy.prompt_format import asked_prompt
from speechalign.policy.reward_model import RewardModel, load_reward_model, save_reward_model
from speechalign.policy.text import TextFrontend
from speechalign.policy.vocabulary import EOS_ID
from speechalign.seeds import derive_seed
from speechalign.serving.api import build_api
from speechalign.serving.app import Ingress
from speechalign.serving.bodies import body_of
from speechalign.serving.keys import ApiKey, Gate
from speechalign.serving.memory import Memory
from speechalign.serving.problems import Problem
from speechalign.serving.renderer import VoiceRenderer
from speechalign.serving.service import SpeechService
from speechalign.serving.speaker import Ask, PolicySpeaker, Spoken
from speechalign.serving.telemetry import Telemetry
from tests.serving_stack import AUTHORISED, KEY, LINE, build_service, client_of, serving_config

SPEECH = "/v1/audio/speech"
VOICES = "/v1/audio/voices"
ASSETS_AR = Path("speechalign/assets/ar")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> SpeechService:
    return build_service(serving_config(tmp_path_factory.mktemp("voices") / "uploads"))


@pytest.fixture(scope="module")
def client(service: SpeechService) -> Iterator[TestClient]:
    with client_of(service) as one:
        yield one


def wave_of(data: bytes) -> tuple[int, int]:
    samples_N, rate_hz = sf.read(io.BytesIO(data))
    assert np.abs(samples_N).max() > 0.01
    return len(samples_N), rate_hz


def test_a_text_is_spoken_the_same_whole_or_streamed(client: TestClient):
    streamed = client.post(SPEECH, json=LINE | {"response_format": "wav"})
    whole = client.post(SPEECH, json=LINE | {"response_format": "wav", "stream": False})
    assert streamed.status_code == whole.status_code == 200
    assert streamed.headers["content-type"] == "audio/wav"
    assert streamed.headers["x-policy-version"] == "0"
    length, rate_hz = wave_of(whole.content)
    assert rate_hz == 16_000
    assert length % 320 == 0
    assert wave_of(streamed.content) == (length, rate_hz)
    assert streamed.content[-2 * length :] == whole.content[-2 * length :]


def test_another_seed_speaks_differently_and_the_seed_used_is_told(client: TestClient):
    unseeded = {key: value for key, value in LINE.items() if key != "seed"}
    first = client.post(SPEECH, json=unseeded | {"response_format": "pcm"})
    seed = int(first.headers["x-seed"])
    again = client.post(SPEECH, json=LINE | {"response_format": "pcm", "seed": seed})
    other = client.post(SPEECH, json=LINE | {"response_format": "pcm", "seed": seed ^ 1})
    assert first.content == again.content != other.content


def test_pcm_is_24_khz_and_says_so(client: TestClient):
    answer = client.post(SPEECH, json=LINE | {"response_format": "pcm"})
    wav = client.post(SPEECH, json=LINE | {"response_format": "wav"})
    assert answer.headers["content-type"] == "audio/pcm;rate=24000;channels=1"
    assert len(answer.content) / 2 == wave_of(wav.content)[0] * 1.5


def test_speed_shortens_the_speech(client: TestClient):
    plain, fast = (
        wave_of(client.post(SPEECH, json=LINE | {"response_format": "wav", "speed": s}).content)[0]
        for s in (1, 2.0)
    )
    assert fast == pytest.approx(plain / 2, abs=1_500)


def test_two_sentences_have_a_pause_between_them(client: TestClient, service: SpeechService):
    pause = round(service.config.streaming.pause_s * 16_000)
    both = client.post(SPEECH, json=LINE | {"input": "Yes. No.", "response_format": "wav"})
    samples_N, _ = sf.read(io.BytesIO(both.content))
    silent = np.convolve(np.abs(samples_N) < 1e-9, np.ones(pause), "valid")
    assert silent.max() == pause


def test_events_carry_the_audio_and_end_with_the_usage(client: TestClient):
    asked = LINE | {"response_format": "wav", "stream_format": "sse"}
    answer = client.post(SPEECH, json=asked)
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.split("\n\n") if line]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert [event["type"] for event in events[:-1]] == ["speech.audio.delta"] * (len(events) - 1)
    assert events[-1]["type"] == "speech.audio.done"
    audio = b"".join(base64.b64decode(event["audio"]) for event in events[:-1])
    length, _ = wave_of(audio)
    usage = events[-1]["usage"]
    assert usage["output_tokens"] == length / 320
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


@pytest.mark.parametrize("change", [{"speed": 1}, {"seed": 1.0, "n_best": 1.0}])
def test_a_json_number_is_taken_however_it_is_written(client: TestClient, change: dict[str, Any]):
    plain = client.post(SPEECH, json=LINE | {"response_format": "pcm"})
    assert client.post(SPEECH, json=LINE | change | {"response_format": "pcm"}).content == (
        plain.content
    )


@pytest.fixture(scope="module")
def choosing(tmp_path_factory: pytest.TempPathFactory) -> SpeechService:
    """A service whose policy has a reward model, a random one."""
    folder = tmp_path_factory.mktemp("choosing")
    policy = load_ar(Path("speechalign/assets/ar"))
    torch.manual_seed(0)
    model = RewardModel(policy.model).eval()
    facts = {"codec_fingerprint": policy.facts["codec_fingerprint"]}
    save_reward_model(folder / "rm", model, policy.vocabulary, facts)
    served = {"path": "speechalign/assets/ar", "reward_model": folder / "rm"}
    return build_service(serving_config(folder / "voices", policies={"base": served}))


def test_n_answers_are_asked_for_over_http_and_no_more_than_allowed(choosing: SpeechService):
    with client_of(choosing) as client:
        asked = LINE | {"n_best": 2, "response_format": "wav"}
        assert wave_of(client.post(SPEECH, json=asked).content)[0] > 0
        too_many = client.post(SPEECH, json=LINE | {"n_best": 99})
        assert refused(too_many) == (400, "n_best", "invalid_value")


def test_of_n_answers_the_one_that_the_reward_model_likes_best_is_heard(choosing: SpeechService):
    service, policy = choosing, load_ar(Path("speechalign/assets/ar"))
    voice = service.voices.find("alloy")
    assert voice is not None
    speaker = PolicySpeaker(service.config)
    phonemes = TextFrontend().phonemize("Good morning.")

    async def heard_and_candidates() -> tuple[Spoken, list[tuple[float, list[int]]]]:
        await speaker.reconfigure(service.config.policies["base"].model_dump(mode="json"))
        ask = Ask(phonemes=phonemes, voice_codes_KT=voice.codes_KT, seed=4, n_best=3,
                  codec_fingerprint=voice.codec_fingerprint)  # fmt: skip
        (spoken,) = [one async for one in speaker.speak(ask)]
        folder = service.config.policies["base"].reward_model
        assert folder is not None
        model = load_reward_model(folder)
        prompt = asked_prompt(policy.vocabulary, policy.facts, phonemes, voice.codes_KT)
        engine = TransformersEngine(Path("speechalign/assets/ar"), TransformersConfig())
        allowed = (EOS_ID, *policy.vocabulary.code_ids)
        params = SamplingParams(
            temperature=0.7, top_p=1.0, top_k=0, max_new_tokens=150, eos_id=EOS_ID,
            allowed_ids=allowed,
        )  # fmt: skip
        seeds = tuple(derive_seed(4, "best", index) for index in range(3))
        request = GenerationRequest(prompt_token_ids=prompt, seeds=seeds)
        (group,) = engine.generate([request], params)
        rewards = model.rewards([(prompt, one.token_ids) for one in group])
        ranked = zip(rewards, [list(one.token_ids) for one in group], strict=True)
        return spoken, sorted(ranked, reverse=True)

    spoken, candidates = asyncio.run(heard_and_candidates())
    levels_S = policy.vocabulary.layout.flatten(spoken.codes_kT.astype(np.int64))
    assert [*levels_S.tolist(), EOS_ID] == candidates[0][1] != candidates[-1][1]


def test_a_client_that_stops_in_the_middle_of_its_body_is_told_so():
    async def read() -> None:
        async def silence() -> Message:
            await asyncio.sleep(30)
            raise AssertionError("nobody waits so long")

        scope = {"type": "http", "method": "POST", "headers": []}
        await body_of(Request(scope, silence), 100, 0.05)

    with pytest.raises(Problem) as caught:
        asyncio.run(read())
    assert (caught.value.status, caught.value.body.code) == (408, "body_timeout")


class Mortal:
    """A speaker that dies after its first words."""

    def __init__(self, speaker: PolicySpeaker) -> None:
        self._speaker = speaker

    async def facts(self) -> dict[str, Any]:
        return await self._speaker.facts()

    async def speak(self, ask: Ask) -> AsyncGenerator[Spoken]:
        count = 0
        async for spoken in self._speaker.speak(ask):
            yield spoken
            count += spoken.codes_kT.shape[1]
            if count > 60:
                raise EngineDead("killed")


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> SpeechService:
    config = serving_config(tmp_path_factory.mktemp("mortal"))
    speaker = PolicySpeaker(config)
    asyncio.run(speaker.reconfigure({"path": "speechalign/assets/ar"}))
    return SpeechService(config, {"base": Mortal(speaker)}, VoiceRenderer(config), Telemetry())


class Deaf:
    """A policy and a renderer whose processes are gone: Serve's handles wait for ever."""

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        async def wait(*_: object) -> None:
            await asyncio.Event().wait()

        return wait


def deaf() -> Any:
    return Deaf()


def impatient(folder: Path) -> ServingConfig:
    changes = {"streaming": {"piece_timeout_s": 0.1}, "limits": {"max_streams": 1}}
    return serving_config(folder, **changes)


def test_a_policy_that_never_answers_keeps_no_stream_and_the_endpoint_is_not_ready(tmp_path: Path):
    service = SpeechService(impatient(tmp_path), {"base": deaf()}, deaf(), Telemetry())
    with client_of(service) as client:
        for _ in range(2):  # the second would be told 429 if the first still had the only slot
            assert refused(client.post(SPEECH, json=LINE)) == (504, None, "timeout")
        assert refused(client.get("/v1/models")) == (504, None, "timeout")
        assert refused(client.get("/ready")) == (503, None, "not_ready")
        assert client.get("/health").status_code == 200


def test_a_renderer_that_never_answers_keeps_no_stream_and_no_upload(tmp_path: Path):
    service = SpeechService(impatient(tmp_path), {"base": a_speaker()}, deaf(), Telemetry())
    with client_of(service) as client:
        for _ in range(2):
            assert refused(client.post(SPEECH, json=LINE)) == (504, None, "timeout")
        assert refused(upload(client, clip(3.0))) == (504, None, "timeout")


class Quiet:
    """A speaker that says nothing of some sentences, and writes down what it was asked."""

    def __init__(self, speaker: PolicySpeaker, *unsaid: str) -> None:
        self._speaker = speaker
        self._unsaid = [TextFrontend().phonemize(text) for text in unsaid]
        self.asked: list[Ask] = []

    async def facts(self) -> dict[str, Any]:
        return await self._speaker.facts()

    async def speak(self, ask: Ask) -> AsyncGenerator[Spoken]:
        self.asked.append(ask)
        async for spoken in self._speaker.speak(ask):
            if ask.phonemes not in self._unsaid:
                yield spoken
            elif spoken.is_last:
                nothing = np.zeros((len(spoken.codes_kT), 0), np.int16)
                yield Spoken(codes_kT=nothing, is_last=True, is_truncated=False)


@contextmanager
def quiet_client(speaker: Quiet) -> Iterator[TestClient]:
    config = serving_config(Path("unused"))
    service = SpeechService(config, {"base": speaker}, VoiceRenderer(config), Telemetry())
    with client_of(service) as client:
        yield client


@pytest.mark.parametrize("unsaid", [("Yes.", "No."), ("Yes.",)], ids=["both", "first"])
def test_a_text_of_which_nothing_is_said_is_no_pause_but_a_failure(unsaid: tuple[str, ...]):
    with quiet_client(Quiet(a_speaker(), *unsaid)) as client:
        for container in ("pcm", "wav"):
            asked = LINE | {"input": "Yes. No.", "response_format": container, "stream": False}
            assert refused(client.post(SPEECH, json=asked)) == (500, None, "no_speech")


def test_a_later_sentence_of_which_nothing_is_said_is_not_left_out_in_silence():
    with quiet_client(Quiet(a_speaker(), "No.")) as client:
        asked = LINE | {"input": "Yes. No. Yes.", "response_format": "pcm"}
        answer = client.post(SPEECH, json=asked | {"stream_format": "sse"})
    assert answer.status_code == 200
    events = [json.loads(one.removeprefix("data: ")) for one in answer.text.split("\n\n") if one]
    assert {event["type"] for event in events[:-1]} == {"speech.audio.delta"}
    assert events[-1]["type"] == "speech.audio.error"
    assert events[-1]["error"]["code"] == "no_speech"


def test_the_version_that_a_model_names_is_asked_of_the_speaker_and_no_other_model_names_one():
    speaker = Quiet(a_speaker())
    with quiet_client(speaker) as client:
        for model in ("base@0", "base"):
            assert client.post(SPEECH, json=LINE | {"model": model}).status_code == 200
    assert [ask.version for ask in speaker.asked] == [0, None]


LONGER = LINE | {"input": "The harbour was quiet in the morning.", "response_format": "wav"}


def test_a_stream_that_fails_is_never_ended_as_if_it_were_whole(mortal: SpeechService):
    api = build_api(mortal, Gate([], mortal.config.limits), Telemetry())
    with TestClient(api, raise_server_exceptions=True) as client, pytest.raises(EngineDead):
        client.post(SPEECH, json=LONGER)


def test_a_failure_after_the_first_event_is_told_by_an_event(mortal: SpeechService):
    with client_of(mortal) as client:
        answer = client.post(SPEECH, json=LONGER | {"stream_format": "sse"})
    assert answer.status_code == 200
    last = json.loads(answer.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["type"] == "speech.audio.error"
    assert last["error"]["code"] == "engine_failed"


def test_a_failure_before_the_first_sound_is_a_server_error(mortal: SpeechService):
    with client_of(mortal) as client:
        answer = client.post(SPEECH, json=LONGER | {"response_format": "flac"})
    assert refused(answer) == (500, None, "engine_failed")
    assert "killed" not in answer.text


def refused(answer: Any) -> tuple[int, str | None, str | None]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return answer.status_code, error["param"], error["code"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"input": ""}, (400, "input", "invalid_value")),
        ({"input": "x" * 4097}, (400, "input", "input_too_long")),
        ({"input": 5}, (400, "input", "invalid_value")),
        ({"input": "hi \U0001f600"}, (400, "input", "unspeakable_text")),
        ({"input": "\u4f60\u597d"}, (400, "input", "unspeakable_text")),
        ({"input": " ... "}, (400, "input", "unspeakable_text")),
        ({"voice": "nobody"}, (400, "voice", "unknown_voice")),
        ({"voice": "../alloy"}, (400, "voice", "unknown_voice")),
        ({"voice": {"id": "nobody"}}, (400, "voice", "unknown_voice")),
        ({"voice": 3}, (400, "voice.str", "invalid_value")),
        ({"model": "gpt-4o-mini-tts"}, (404, "model", "model_not_found")),
        ({"model": "base@7"}, (404, "model", "model_not_found")),
        ({"response_format": "ogg"}, (400, "response_format", "invalid_value")),
        ({"speed": 0.2}, (400, "speed", "invalid_value")),
        ({"speed": 4.1}, (400, "speed", "invalid_value")),
        ({"speed": "fast"}, (400, "speed", "invalid_value")),
        ({"speed": "1.0"}, (400, "speed", "invalid_value")),
        ({"speed": None}, (400, "speed", "invalid_value")),
        ({"stream_format": "json"}, (400, "stream_format", "invalid_value")),
        ({"n_best": 0}, (400, "n_best", "invalid_value")),
        ({"n_best": 2}, (400, "n_best", "no_reward_model")),
        ({"input": "7" * 37}, (400, "input", "unspeakable_text")),
        ({"input": "987654321 " * 11}, (400, "input", "input_too_long")),
        ({"seed": -1}, (400, "seed", "invalid_value")),
        ({"pitch": 1}, (400, "pitch", "invalid_value")),
    ],
)
def test_a_value_that_cannot_be_served_is_named(
    client: TestClient, change: dict[str, Any], expected: tuple[int, str, str]
):
    assert refused(client.post(SPEECH, json=LINE | change)) == expected


@pytest.mark.parametrize("field", ["model", "input", "voice"])
def test_a_missing_field_is_named(client: TestClient, field: str):
    body = {key: value for key, value in LINE.items() if key != field}
    assert refused(client.post(SPEECH, json=body)) == (400, field, "invalid_value")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "bad_json"),
        (b"", 400, "bad_json"),
        (b"[]", 400, "bad_json"),
        (b"\xff\xfe", 400, "bad_json"),
        (b"[" * 30_000, 400, "bad_json"),
        (b'{"model": "base", "voice": "alloy", "input": "a", "speed": NaN}', 400, "invalid_value"),
        (b'{"input": "' + b"a" * 50_000 + b'"}', 413, "body_too_large"),
    ],
)
def test_a_body_that_is_no_request_is_refused(
    client: TestClient, body: bytes, status: int, code: str
):
    answer = client.post(SPEECH, content=body, headers={"Content-Type": "application/json"})
    assert refused(answer)[::2] == (status, code)


def test_a_body_of_200_mb_is_refused_before_it_is_read(client: TestClient):
    headers = {"Content-Type": "application/json", "Content-Length": "200000000"}
    answer = client.post(SPEECH, content=b"{}", headers=headers)
    assert refused(answer) == (413, None, "body_too_large")


def test_a_body_that_does_not_say_its_length_is_cut_while_it_is_read(client: TestClient):
    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b"a" * 10_000

    answer = client.post(SPEECH, content=endless(), headers={"Content-Type": "application/json"})
    assert refused(answer) == (413, None, "body_too_large")


def test_another_content_type_is_refused(client: TestClient):
    answer = client.post(SPEECH, content=b"a=1", headers={"Content-Type": "text/plain"})
    assert refused(answer) == (415, None, "bad_type")


@pytest.mark.parametrize("path", ["/v1/models", VOICES, "/v1/models/base"])
def test_without_a_key_nothing_is_told(service: SpeechService, path: str):
    with client_of(service, ApiKey(name="me", key=KEY)) as guarded:
        assert refused(guarded.get(path)) == (401, None, "invalid_api_key")
        assert refused(guarded.post(SPEECH, json=LINE)) == (401, None, "invalid_api_key")
        assert guarded.get(f"/v1/models?api_key={KEY}").status_code == 401
        assert guarded.get(path, headers=AUTHORISED).status_code == 200
        assert guarded.get("/health").status_code == guarded.get("/").status_code == 200


def test_a_key_may_have_limits_of_its_own(service: SpeechService):
    strict = ApiKey(name="me", key=KEY, max_input_characters=5, max_upload_bytes=100)
    with client_of(service, strict) as guarded:
        answer = guarded.post(SPEECH, json=LINE, headers=AUTHORISED)
        assert refused(answer) == (400, "input", "input_too_long")
        answer = upload(guarded, clip(3.0), headers=AUTHORISED)
        assert refused(answer) == (413, None, "body_too_large")


def test_too_many_streams_are_told_to_come_back(tmp_path: Path):
    config = serving_config(tmp_path, limits={"max_streams": 1, "retry_after_s": 7})
    service = build_service(config)
    with client_of(service) as crowded:
        assert crowded.portal is not None
        slot = service.slot()
        crowded.portal.call(slot.__aenter__)
        answer = crowded.post(SPEECH, json=LINE)
        assert refused(answer) == (429, None, "overloaded")
        assert answer.headers["Retry-After"] == "7"
        crowded.portal.call(slot.__aexit__, None, None, None)
        assert crowded.post(SPEECH, json=LINE).status_code == 200


class Recorder:
    """A metric that remembers what it was told."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def set(self, value: float) -> None:
        self.values.append(value)

    def inc(self, value: float = 1.0, tags: object = None) -> None:
        self.values.append(value)

    observe = inc


def recorded(speaker: Any, text: str) -> tuple[dict[str, list[float]], Any]:
    """Return what the metrics were told while a text was spoken, and the answer."""
    telemetry: Any = Telemetry()
    for name in vars(telemetry):
        setattr(telemetry, name, Recorder())
    config = serving_config(Path("unused"))
    service = SpeechService(config, {"base": speaker}, VoiceRenderer(config), telemetry)
    with client_of(service) as client:
        answer = client.post(SPEECH, json=LINE | {"input": text, "response_format": "wav"})
    return {name: metric.values for name, metric in vars(telemetry).items()}, answer


def test_streams_queue_and_real_time_factor_are_told_to_the_metrics():
    began = time.perf_counter()
    told, answer = recorded(a_speaker(), "Good morning.")
    took_s = time.perf_counter() - began
    spoken_s = wave_of(answer.content)[0] / 16_000
    assert told["streams"] == told["queue"] == [1, 0]
    assert told["audio"] == [pytest.approx(spoken_s)]
    ((first_s,), (factor,)) = told["first_audio"], told["real_time"]
    assert 0 < first_s <= factor * spoken_s < took_s
    assert told["ends"] == [1.0]


def test_a_stream_that_ends_without_a_sound_waits_no_longer():
    told, answer = recorded(Quiet(a_speaker(), "Yes."), "Yes.")
    assert refused(answer) == (500, None, "no_speech")
    assert told["streams"] == told["queue"] == [1, 0]
    assert told["real_time"] == told["first_audio"] == []


def test_an_endpoint_that_ends_lets_nobody_in_and_waits_for_open_streams(tmp_path: Path):
    service = build_service(serving_config(tmp_path, drain_s=30))

    async def drained_while_one_speaks() -> list[str]:
        order: list[str] = []

        async def speak() -> None:
            async with service.slot():
                await asyncio.sleep(0.3)
                order.append("spoken")

        open_one = asyncio.create_task(speak())
        await asyncio.sleep(0.05)
        began = time.monotonic()
        await service.drain()
        assert time.monotonic() - began < 15  # and not the 30 s that it might have taken
        order.append("drained")
        await open_one
        return order

    assert asyncio.run(drained_while_one_speaks()) == ["spoken", "drained"]
    with client_of(service) as late:
        answer = late.post(SPEECH, json=LINE)
    assert refused(answer) == (503, None, "closing")
    assert answer.headers["Retry-After"] == "2"


def test_an_endpoint_that_goes_on_after_all_lets_streams_in_and_waits_for_none(tmp_path: Path):
    service = SpeechService(serving_config(tmp_path), {}, deaf(), Telemetry())
    ingress: Any = SimpleNamespace(_service=service)

    async def drained_and_reopened() -> None:
        async with service.slot():
            draining = asyncio.create_task(Ingress.reconfigure(ingress, {"is_draining": True}))
            await asyncio.sleep(0)
            await Ingress.reconfigure(ingress, {"is_draining": False})
            await asyncio.wait_for(draining, 5)
            async with service.slot():
                pass

    asyncio.run(drained_and_reopened())


def a_speaker(path: str = "speechalign/assets/ar", memory: Memory | None = None) -> PolicySpeaker:
    speaker = PolicySpeaker(serving_config(Path("unused")), memory)
    asyncio.run(speaker.reconfigure({"path": path}))
    return speaker


def another_policy(folder: Path, **changes: Any) -> Path:
    """Write the embedded policy's folder with other facts or another model's config."""
    with committed_folder(folder, manifest_facts(ASSETS_AR) | {"policy_version": 1}) as partial:
        for file in ("config.json", "vocabulary.json", "model.safetensors"):
            shutil.copy(ASSETS_AR / file, partial / file)
        values = json.loads((partial / "config.json").read_text()) | changes
        (partial / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 5}, None], ids=["layers", "nowhere"])
def test_a_policy_that_cannot_take_the_place_is_refused_and_the_old_one_speaks(
    tmp_path: Path, changes: dict[str, Any] | None
):
    speaker = a_speaker()
    path = tmp_path / "next"
    if changes is not None:
        another_policy(path, **changes)
    asyncio.run(speaker.reconfigure({"path": str(path)}))
    facts = asyncio.run(speaker.facts())
    assert facts["version"] == 0
    assert f"{path} was refused" in facts["refused"]
    asyncio.run(speaker.reconfigure({"path": str(another_policy(tmp_path / "good"))}))
    facts = asyncio.run(speaker.facts())
    assert (facts["version"], facts["refused"]) == (1, "")
    speaker.check_health()


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    """A memory in a store that outlives the speakers of a test; on a cluster it is Ray's."""
    kept: dict[tuple[str, str], bytes] = {}

    def put(key: str, value: str, *, namespace: str) -> None:
        kept[namespace, key] = value.encode()

    def get(key: str, *, namespace: str) -> bytes | None:
        return kept.get((namespace, key))

    monkeypatch.setattr("speechalign.serving.memory.store._internal_kv_put", put)
    monkeypatch.setattr("speechalign.serving.memory.store._internal_kv_get", get)
    return Memory("speaker-base")


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 5}, None], ids=["layers", "nowhere"])
def test_a_replica_that_starts_with_a_refused_policy_speaks_with_the_last_good_one(
    tmp_path: Path, memory: Memory, changes: dict[str, Any] | None
):
    first, good, bad = a_speaker(memory=memory), tmp_path / "good", tmp_path / "bad"
    asyncio.run(first.reconfigure({"path": str(another_policy(good))}))
    if changes is not None:
        another_policy(bad, **changes)
    asyncio.run(first.reconfigure({"path": str(bad)}))
    later = a_speaker(str(bad), pickle.loads(pickle.dumps(memory)))
    facts = asyncio.run(later.facts())
    assert facts == asyncio.run(first.facts())
    assert (facts["version"], f"{bad} was refused" in facts["refused"]) == (1, True)
    asyncio.run(later.reconfigure({"path": str(ASSETS_AR)}))
    facts = asyncio.run(later.facts())
    assert (facts["version"], facts["refused"]) == (0, "")


def test_a_policy_that_is_gone_is_remembered_for_nothing(tmp_path: Path, memory: Memory):
    gone = another_policy(tmp_path / "gone")
    a_speaker(str(gone), memory)
    shutil.rmtree(gone)
    with pytest.raises(ConfigError, match="nowhere holds no policy"):
        a_speaker(str(tmp_path / "nowhere"), memory)
    assert asyncio.run(a_speaker(memory=memory).facts())["refused"] == ""


def test_another_application_remembers_nothing_of_this_one(tmp_path: Path, memory: Memory):
    a_speaker(memory=memory)
    with pytest.raises(ConfigError, match="nowhere holds no policy"):
        a_speaker(str(tmp_path / "nowhere"), Memory("speaker-base"))


def test_a_reward_model_of_another_codec_is_refused_and_the_old_one_chooses(
    tmp_path: Path, choosing: SpeechService
):
    served = choosing.config.policies["base"].model_dump(mode="json")
    policy = load_ar(ASSETS_AR)
    other = {"codec_fingerprint": "f" * 16}
    save_reward_model(tmp_path / "rm", RewardModel(policy.model), policy.vocabulary, other)
    next_one = str(another_policy(tmp_path / "next"))
    speaker = PolicySpeaker(choosing.config)
    changed = {"path": next_one, "reward_model": str(tmp_path / "rm")}
    with pytest.raises(DataError, match=r"trained on codec f+, and has to judge"):
        asyncio.run(speaker.reconfigure(changed))
    asyncio.run(speaker.reconfigure(served))
    asyncio.run(speaker.reconfigure(changed))
    facts = asyncio.run(speaker.facts())
    assert (facts["version"], facts["can_choose"]) == (0, True)
    assert f"{next_one} was refused: reward model {tmp_path / 'rm'}" in facts["refused"]
    asyncio.run(speaker.reconfigure(served | {"path": next_one}))
    facts = asyncio.run(speaker.facts())
    assert (facts["version"], facts["refused"]) == (1, "")


def test_who_asked_for_a_version_hears_no_other(tmp_path: Path, service: SpeechService):
    voice = service.voices.find("alloy")
    assert voice is not None
    asks = [
        Ask(
            phonemes=TextFrontend().phonemize("Hello there."),
            voice_codes_KT=voice.codes_KT,
            codec_fingerprint=voice.codec_fingerprint,
            seed=1,
            version=version,
        )
        for version in (0, None)
    ]
    speaker = a_speaker()

    async def num_frames(ask: Ask) -> int:
        return sum([spoken.codes_kT.shape[1] async for spoken in speaker.speak(ask)])

    assert asyncio.run(num_frames(asks[0])) > 0
    asyncio.run(speaker.reconfigure({"path": str(another_policy(tmp_path / "next"))}))
    assert asyncio.run(num_frames(asks[1])) > 0
    with pytest.raises(ConfigError, match="version 0 was asked for"):
        asyncio.run(num_frames(asks[0]))


def test_models_and_voices_are_listed(client: TestClient):
    models = client.get("/v1/models").json()
    assert models["object"] == "list"
    assert [(model["id"], model["version"]) for model in models["data"]] == [("base", 0)]
    assert client.get("/v1/models/base").json() == models["data"][0]
    assert refused(client.get("/v1/models/none")) == (404, "model", "model_not_found")
    names = [voice["id"] for voice in client.get(VOICES).json()["data"]]
    assert {"alloy", "hibari-h00", "allison"} <= set(names)


def test_unknown_paths_and_methods_have_errors_of_the_same_shape(client: TestClient):
    assert refused(client.get("/v1/nothing")) == (404, None, "not_found")
    answer = client.get(SPEECH)
    assert refused(answer) == (405, None, "not_found")
    assert answer.headers["allow"] == "POST"


def test_every_answer_has_the_id_of_its_request(client: TestClient):
    assert client.get("/health", headers={"X-Request-Id": "abc"}).headers["x-request-id"] == "abc"
    made = client.get("/health", headers={"X-Request-Id": "a\tb"}).headers["x-request-id"]
    assert len(made) == 32
    assert client.post(SPEECH, content=b"{").headers["x-request-id"]


def test_the_page_is_there_and_loads_nothing_from_elsewhere(client: TestClient):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert "http://" not in page.text
    assert "https://" not in page.text


def clip(
    seconds: float, *, level: float = 0.5, container: str = "WAV", rate: int = 22_050
) -> bytes:
    count = int(seconds * rate)
    rng = np.random.default_rng(0)
    tone_N = np.sin(2 * np.pi * 150 * np.arange(count) / rate) + 0.1 * rng.standard_normal(count)
    file = io.BytesIO()
    sf.write(file, level * tone_N / max(np.abs(tone_N).max(initial=1e-9), 1e-9), rate,
             format=container)  # fmt: skip
    return file.getvalue()


def upload(
    client: TestClient,
    audio: bytes,
    *,
    name: str = "mine",
    consent: str = "true",
    headers: dict[str, str] | None = None,
) -> Any:
    files = {"audio_sample": ("../../etc/clip.wav", audio, "audio/wav")}
    fields = {"name": name, "consent": consent}
    return client.post(VOICES, data=fields, files=files, headers=headers)


def test_an_uploaded_voice_can_be_spoken_with_and_deleted(client: TestClient):
    answer = upload(client, clip(3.0), name="tone")
    assert answer.status_code == 200
    assert answer.json()["id"] == "tone"
    assert refused(upload(client, clip(3.0), name="tone")) == (409, "name", "voice_exists")
    assert "tone" in [voice["id"] for voice in client.get(VOICES).json()["data"]]
    spoken = client.post(SPEECH, json=LINE | {"voice": {"id": "tone"}, "response_format": "wav"})
    assert spoken.status_code == 200
    assert client.delete(f"{VOICES}/tone").json()["deleted"] is True
    assert refused(client.delete(f"{VOICES}/tone")) == (404, "voice", "unknown_voice")
    assert refused(client.post(SPEECH, json=LINE | {"voice": "tone"}))[0] == 400


def test_the_faster_of_two_uploads_of_one_name_is_kept(service: SpeechService):
    codes_KT = np.zeros((8, 120), np.int16)
    service.voices.store("twice", codes_KT, "f")
    with pytest.raises(ConfigError, match="'twice' already"):
        service.voices.store("twice", codes_KT + 1, "f")
    voice = service.voices.find("twice")
    assert voice is not None
    assert not voice.codes_KT.any()
    (service.config.voices.uploads or Path()).joinpath("twice", "codes.npy").write_bytes(b"")
    assert service.voices.listed()["twice"] == voice.created  # a broken one breaks no list
    assert service.voices.delete("twice")
    assert "twice" not in service.voices.listed()


def test_what_is_wrong_with_a_clip_is_told_without_the_traceback_of_another_process(
    service: SpeechService, monkeypatch: pytest.MonkeyPatch
):
    class FromAfar(DataError):
        cause = DataError("the clip is silence")

    class Renderer:
        async def encode(self, clip: bytes) -> None:
            raise FromAfar("Traceback (most recent call last): ...")

    monkeypatch.setattr(service, "_renderer", Renderer())
    with pytest.raises(Problem, match=r"^the clip is silence$"):
        asyncio.run(service.upload("afar", b""))


def bomb() -> bytes:
    """43 kB of FLAC that are two minutes of silence in two channels at 96 kHz."""
    file = io.BytesIO()
    sf.write(file, np.zeros((120 * 96_000, 2), np.int16), 96_000, format="FLAC")
    return file.getvalue()


@pytest.mark.parametrize(
    ("audio", "says"),
    [
        (b"not audio at all", "no WAV, FLAC, OGG or MP3"),
        (b"", "no WAV, FLAC, OGG or MP3"),
        (clip(0.1), "outside 2.5 to 30.0 s"),
        (clip(31.0, rate=8_000), "outside 2.5 to 30.0 s"),
        (clip(3.0, level=0.0), "silence"),
        (clip(3.0, container="AIFF"), "no WAV, FLAC, OGG or MP3"),
        (clip(3.0, rate=4_000), "outside 8000 to 96000 Hz"),
        (bomb(), "outside 2.5 to 30.0 s"),
        (clip(6.0)[: 3 * 44_100], "it was cut"),
    ],
    ids=["text", "empty", "short", "long", "silent", "aiff", "low rate", "bomb", "cut"],
)
def test_a_clip_that_cannot_be_used_is_refused_with_the_reason(
    client: TestClient, audio: bytes, says: str
):
    answer = upload(client, audio)
    assert refused(answer) == (400, "audio_sample", "unusable_clip")
    assert says in answer.json()["error"]["message"]


@pytest.mark.parametrize("name", ["../mine", "", ".", "..", "a/b", "a\x00b", "x" * 65, ".hidden"])
def test_a_name_that_could_leave_the_folder_is_refused(client: TestClient, name: str):
    assert refused(upload(client, clip(3.0), name=name)) == (400, "name", "invalid_value")


def test_without_consent_no_voice_is_made(client: TestClient):
    assert refused(upload(client, clip(3.0), consent="no")) == (400, "consent", "no_consent")


def test_an_upload_that_is_no_form_or_too_large_is_refused(client: TestClient):
    assert refused(client.post(VOICES, json={"name": "x"})) == (415, None, "bad_type")
    headers = {"Content-Type": "multipart/form-data"}
    assert refused(client.post(VOICES, content=b"x", headers=headers)) == (400, None, "bad_form")
    large = upload(client, b"x" * 2_100_000)
    assert refused(large) == (413, None, "body_too_large")
    assert refused(client.post(VOICES, data={"name": "a", "consent": "true"}))[0] in (400, 415)
