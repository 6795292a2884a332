"""The endpoint as people run it: Serve, vLLM, the official OpenAI client, and things that break."""

import asyncio
import io
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import openai
import pytest
import ray
import soundfile as sf
import yaml

from speechalign.errors import ConfigError
from speechalign.pipeline.bench import replica_of
from speechalign.pipeline.serve import deployed, read_endpoint
from speechalign.policy.ar import load_ar, save_ar
from speechalign.policy.reward_model import RewardModel, save_reward_model
from speechalign.serving.bench import outage, over_http

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

KEY = "a-key-for-the-tests"
AUTHORISED = {"Authorization": f"Bearer {KEY}"}
LONG = "The harbour was quiet in the morning. " * 6
MAX_STREAMS = 2


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def another_policy(folder: Path) -> Path:
    policy = load_ar(Path("speechalign/assets/ar"))
    save_ar(folder, policy.model, policy.vocabulary, dict(policy.facts) | {"policy_version": 1})
    return folder


def a_reward_model(folder: Path) -> Path:
    policy = load_ar(Path("speechalign/assets/ar"))
    facts = {"codec_fingerprint": policy.facts["codec_fingerprint"]}
    save_reward_model(folder, RewardModel(policy.model), policy.vocabulary, facts)
    return folder


@pytest.fixture(scope="module")
def serve_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped file, as a team would change it."""
    folder = tmp_path_factory.mktemp("serve")
    values: dict[str, Any] = yaml.safe_load(Path("jobs/serve-embedded-cpu.yaml").read_text())
    (folder / "keys.yaml").write_text(f"- {{name: team, key: {KEY}}}\n")
    values["http_options"]["port"] = free_port()
    args = values["applications"][0]["args"]
    args["voices"]["uploads"] = str(folder / "voices")
    args["access"] = {"keys_file": str(folder / "keys.yaml")}
    args["limits"] = {"max_streams": MAX_STREAMS}
    args["policies"]["base"]["reward_model"] = str(a_reward_model(folder / "reward-model"))
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture(scope="module")
def address(serve_file: Path) -> Iterator[str]:
    with deployed(read_endpoint(serve_file, None, [], None)) as url:
        yield url


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as one:
        yield one


def speech(**changes: Any) -> dict[str, Any]:
    return {"model": "base", "voice": "alloy", "input": "Good morning.", "extra_body": {"seed": 3},
            **changes}  # fmt: skip


def num_decoded(data: bytes) -> int:
    """Return the samples of a file, as FFmpeg counts them."""
    with av.open(io.BytesIO(data), "r") as container:
        return sum(frame.samples for frame in container.decode(audio=0))


def test_the_official_client_gets_every_format_as_long_as_it_should_be(client: openai.OpenAI):
    wav = client.audio.speech.create(**speech(response_format="wav")).content
    length = len(sf.read(io.BytesIO(wav))[0])
    assert length % 320 == 0
    for name in ("mp3", "opus", "flac", "wav"):
        body = {"seed": 3, "stream": False}
        whole = client.audio.speech.create(**speech(response_format=name, extra_body=body)).content
        assert len(sf.read(io.BytesIO(whole))[0]) == length, name
    pcm = client.audio.speech.create(**speech(response_format="pcm")).content
    assert len(pcm) == 2 * length * 1.5
    aac = client.audio.speech.create(**speech(response_format="aac")).content
    assert 0 <= num_decoded(aac) - length < 2_048


def test_the_official_client_streams_every_format(client: openai.OpenAI):
    lengths: dict[str, int] = {}
    for name in ("wav", "opus", "mp3", "aac", "flac"):
        asked = speech(
            response_format=name, extra_body={"seed": 3, "stream": True}, input=LONG[:75]
        )
        with client.audio.speech.with_streaming_response.create(**asked) as answer:
            chunks = list(answer.iter_bytes(chunk_size=None))
        assert len(chunks) > 3, name
        lengths[name] = num_decoded(b"".join(chunks)) // (3 if name == "opus" else 1)
    wav = lengths.pop("wav")
    assert lengths["opus"] == lengths["flac"] == wav
    assert 0 < lengths["mp3"] - wav < 2_304
    assert 0 <= lengths["aac"] - wav < 2_048


def test_several_answers_are_drawn_and_one_is_heard_the_same_each_time(client: openai.OpenAI):
    def said(**own: Any) -> bytes:
        return client.audio.speech.create(
            **speech(response_format="pcm", extra_body={"seed": 3, **own})
        ).content

    chosen = said(n_best=4)
    assert len(chosen) > 0
    assert chosen == said(n_best=4)
    assert chosen != said()


def test_the_official_client_understands_our_refusals(client: openai.OpenAI, address: str):
    with pytest.raises(openai.NotFoundError) as missing:
        client.audio.speech.create(**speech(model="tts-1"))
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as unspeakable:
        client.audio.speech.create(**speech(input="\U0001f600"))
    assert unspeakable.value.param == "input"
    stranger = openai.OpenAI(base_url=f"{address}/v1", api_key="not-a-known-key", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    assert [model.id for model in client.models.list()] == ["base"]


def test_an_address_that_serve_would_ignore_is_refused_and_what_runs_goes_on(
    client: openai.OpenAI, serve_file: Path
):
    elsewhere = read_endpoint(serve_file, None, [], f"127.0.0.1:{free_port()}")
    with pytest.raises(ConfigError, match=r"listens on 127\.0\.0\.1:"), deployed(elsewhere):
        pass
    assert [model.id for model in client.models.list()] == ["base"]


def test_a_clip_that_cannot_be_used_is_refused_without_a_traceback(client: openai.OpenAI):
    silence = io.BytesIO()
    sf.write(silence, np.zeros(48_000, np.int16), 16_000, format="WAV")
    answer = httpx.post(
        f"{client.base_url}audio/voices",
        headers=AUTHORISED,
        data={"name": "mute", "consent": "true"},
        files={"audio_sample": ("mute.wav", silence.getvalue(), "audio/wav")},
        timeout=60,
    )
    assert answer.status_code == 400
    assert "silence" in (message := answer.json()["error"]["message"])
    assert "Traceback" not in message
    assert "ray::" not in message


def open_stream(http: httpx.Client, text: str = LONG) -> Generator[bytes]:
    body = {"model": "base", "voice": "alloy", "input": text, "response_format": "pcm"}
    with http.stream("POST", "/v1/audio/speech", json=body, headers=AUTHORISED) as answer:
        yield str(answer.status_code).encode()
        yield from answer.iter_raw()


def wait_for_metrics(*wanted: str) -> None:
    """Return when Prometheus could read them: Ray collects them every few seconds."""
    node = ray.nodes()[0]
    metrics = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + 60
    while not all(name in (text := httpx.get(metrics).text) for name in wanted):
        assert time.monotonic() < deadline, [x for x in text.splitlines() if "speechalign" in x]
        time.sleep(1)


def test_streams_beyond_the_limit_are_told_to_come_back_and_a_client_that_leaves_frees_its_place(
    address: str,
):
    with httpx.Client(base_url=address, timeout=60) as http:
        streams = [open_stream(http) for _ in range(MAX_STREAMS)]
        assert [next(stream) for stream in streams] == [b"200"] * MAX_STREAMS
        refused = open_stream(http)
        assert next(refused) == b"429"
        streams[0].close()
        deadline = time.monotonic() + 120
        while next(again := open_stream(http, "Good morning.")) != b"200":
            again.close()
            assert time.monotonic() < deadline, "the place was never freed"
            time.sleep(0.2)
        assert sum(map(len, again)) > 0
        assert sum(map(len, streams[1])) > 0
    wait_for_metrics('end="cancelled"')  # it was not freed by having come to its end


def model_of(http: httpx.Client) -> dict[str, Any]:
    (model,) = http.get("/v1/models", headers=AUTHORISED).json()["data"]
    return model


def version_of(http: httpx.Client) -> int:
    return model_of(http)["version"]


def test_a_policy_is_swapped_in_place_and_no_open_stream_is_dropped(
    address: str, serve_file: Path, tmp_path: Path
):
    before = replica_of("speaker-base").pid
    with httpx.Client(base_url=address, timeout=60) as http:
        stream = open_stream(http)
        assert next(stream) == b"200"
        next(stream)
        swapped = read_endpoint(serve_file, None, [], None).with_policy(
            "base", another_policy(tmp_path / "next")
        )
        with deployed(swapped, stays=True):
            assert sum(map(len, stream)) > 0
            deadline = time.monotonic() + 120
            while version_of(http) != 1:
                assert time.monotonic() < deadline, "the policy was never swapped"
                time.sleep(0.2)
            spoken = open_stream(http, "Good morning.")
            assert next(spoken) == b"200"
            assert sum(map(len, spoken)) > 0
            with deployed(swapped.with_policy("base", tmp_path / "nowhere"), stays=True):
                assert "nowhere was refused" in model_of(http)["refused"]
                assert version_of(http) == 1
            with deployed(swapped, stays=True):
                assert model_of(http)["refused"] == ""
    assert replica_of("speaker-base").pid == before


def test_a_replica_that_dies_while_a_policy_is_refused_is_followed_by_one_that_speaks(
    address: str, serve_file: Path, tmp_path: Path
):
    first = read_endpoint(serve_file, None, [], None)
    with httpx.Client(base_url=address, timeout=60) as http:
        version = version_of(http)
        with deployed(first.with_policy("base", tmp_path / "nowhere"), stays=True):
            dead = replica_of("speaker-base")
            dead.kill()
            dead.wait()
            deadline = time.monotonic() + 180
            while http.get("/ready").status_code != 200:
                assert time.monotonic() < deadline, "no replica could start"
                time.sleep(0.5)
            assert "nowhere was refused" in model_of(http)["refused"]
            assert version_of(http) == version
        with deployed(first, stays=True):
            assert model_of(http)["refused"] == ""


def test_prometheus_learns_how_long_people_waited_and_why_they_were_refused(address: str):
    with httpx.Client(base_url=address, timeout=60) as http:
        assert next(open_stream(http, "")) == b"400"
    wait_for_metrics(
        "speechalign_first_audio_seconds_bucket",
        "speechalign_real_time_factor_bucket",
        "speechalign_streams{",
        "speechalign_queue{",
        'reason="invalid_value"',
    )


def test_when_a_replica_dies_its_stream_ends_visibly_and_the_next_request_is_served(address: str):
    async def killed() -> dict[str, Any]:
        async with httpx.AsyncClient(base_url=address, headers=AUTHORISED, timeout=120) as http:
            speak = over_http(http, "base", "alloy")
            return await outage(speak, replica_of("speaker-base").kill)

    seen = asyncio.run(killed())
    assert seen["broken_streams"] == 1
    assert seen["answers"].pop(200) == 1
    assert set(seen["answers"]) <= {500, 503, 504}
    assert seen["seconds_to_next_sound"] > 0


@contextmanager
def command(folder: Path, text: str) -> Iterator[tuple[subprocess.Popen[bytes], Iterator[bytes]]]:
    """Yield `speechalign serve` and a stream of it that has begun; it writes to `folder/log`."""
    port = free_port()
    words = [sys.executable, "-m", "tests.ray.warm_workers.command", "speechalign", "serve",
             f"voices.uploads={folder}/voices", f"--listen=127.0.0.1:{port}"]  # fmt: skip
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        deadline = time.monotonic() + 180
        while not is_ready(http):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.5)
        stream = open_stream(http, text)
        assert next(stream) == b"200"
        next(stream)
        yield process, stream


@pytest.mark.usefixtures("clusters")  # its server forks the workers
def test_the_command_serves_and_finishes_an_open_stream_when_it_is_told_to_end(tmp_path: Path):
    with command(tmp_path, LONG) as (process, stream):
        process.send_signal(signal.SIGTERM)
        assert sum(map(len, stream)) > 0
    assert process.wait(120) == 0
    assert "finishing open streams" in (tmp_path / "log").read_text()


@pytest.mark.usefixtures("clusters")
def test_the_command_that_is_told_twice_does_not_wait_for_an_open_stream(tmp_path: Path):
    with command(tmp_path, LONG * 8) as (process, stream):
        process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + 60
        while "finishing open streams" not in (tmp_path / "log").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert process.wait(120) == 130
        assert time.monotonic() - began < 20  # Serve's own end takes 30 s
        with pytest.raises(httpx.RemoteProtocolError):
            list(stream)


def is_ready(http: httpx.Client) -> bool:
    try:
        return http.get("/ready").status_code == 200
    except httpx.TransportError:
        return False
