"""What `speechalign serve` is told, and what it refuses before anything starts."""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from speechalign.artifacts import committed_folder
from speechalign.cli import app
from speechalign.config.codec import EncodecHfConfig, EncodecPackageConfig
from speechalign.errors import ConfigError, DataError
from speechalign.pipeline.serve import Endpoint, deployed, read_endpoint, serve_until_told
from speechalign.pipeline.served_run import args_of
from speechalign.policy.ar import load_ar
from speechalign.policy.reward_model import RewardModel, save_reward_model
from speechalign.serving.app import check_endpoint

FILE = Path("jobs/serve-embedded-cpu.yaml")
BASE = Path("speechalign/assets/ar")


def test_the_shipped_file_listens_where_it_says_and_could_start():
    endpoint = read_endpoint(FILE, None, [], None)
    assert endpoint.address == "http://127.0.0.1:8000"
    assert endpoint.config.policies["base"].path == BASE.resolve()
    check_endpoint(endpoint.config)


def test_an_address_that_others_reach_needs_keys(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SPEECHALIGN_API_KEYS", raising=False)
    for listen in ("0.0.0.0:8000", "[::]:8000", "10.0.0.1:80", "speech.example:80"):
        with pytest.raises(ConfigError, match="has no API keys"):
            check_endpoint(read_endpoint(FILE, None, [], listen).config)
    for listen in ("127.0.0.1:1", "localhost:1", "[::1]:1"):
        check_endpoint(read_endpoint(FILE, None, [], listen).config)
    monkeypatch.setenv("SPEECHALIGN_API_KEYS", "team:" + "k" * 16)
    check_endpoint(read_endpoint(FILE, None, [], "0.0.0.0:8000").config)


def test_nobody_can_ask_for_anonymous_clients_where_others_reach(monkeypatch: pytest.MonkeyPatch):
    override = ["access.allow_anonymous=true"]
    monkeypatch.setenv("SPEECHALIGN_API_KEYS", "team:" + "k" * 16)  # which would not be asked for
    with pytest.raises(ConfigError, match=r"would let in everybody who reaches 0\.0\.0\.0:8000"):
        read_endpoint(FILE, None, override, "0.0.0.0:8000")
    assert read_endpoint(FILE, None, override, "localhost:1").config.access.allow_anonymous


def test_an_access_that_says_nothing_lets_nobody_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("SPEECHALIGN_API_KEYS", raising=False)
    args: dict[str, Any] = yaml.safe_load(FILE.read_text())["applications"][0]["args"]
    empty = changed_file(tmp_path, {}, {"args": args | {"access": None}})
    for listen in ("127.0.0.1:1", "0.0.0.0:1"):
        with pytest.raises(ConfigError, match="has no API keys"):
            check_endpoint(read_endpoint(empty, None, [], listen).config)
    wrong = changed_file(tmp_path, {}, {"args": args | {"access": ["keys.yaml"]}})
    with pytest.raises(ConfigError, match=r"args\.access must hold a mapping"):
        read_endpoint(wrong, None, [], None)


@pytest.mark.parametrize("listen", ["8000", "host:", "host:http", "127.0.0.1:70000", ""])
def test_what_is_no_address_is_refused(listen: str):
    with pytest.raises(ConfigError, match="no address to listen at"):
        read_endpoint(FILE, None, [], listen)


def policies_of(path: Path) -> dict[str, Path]:
    policies = args_of(path, {})["policies"]
    return {name: Path(policy["path"]) for name, policy in policies.items()}


def write_recipe(run: Path, **changes: Any) -> None:
    recipe = yaml.safe_load(Path("jobs/align-embedded-cpu.yaml").read_text()) | changes
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))


def commit_policy(run: Path, number: int) -> None:
    with committed_folder(run / f"iteration-{number}" / "policy", {"kind": "ar"}):
        pass


def test_a_policy_is_served_alone_and_a_run_beside_its_start(tmp_path: Path):
    assert policies_of(BASE) == {"policy": BASE}
    write_recipe(tmp_path, pipeline={"iterations": 2})
    with pytest.raises(ConfigError, match="no run with a trained one"):
        policies_of(tmp_path)
    for number in (1, 2):
        commit_policy(tmp_path, number)
    assert policies_of(tmp_path) == {"base": BASE, "aligned": tmp_path / "iteration-2" / "policy"}
    first = tmp_path / "iteration-1" / "policy"
    for iteration, policy, aligned in ((1, "iteration-1/policy", first), (0, "/gone", BASE)):
        with committed_folder(tmp_path / "best", {"iteration": iteration, "policy": policy}):
            pass
        assert policies_of(tmp_path)["aligned"] == aligned
    with committed_folder(tmp_path / "best", {"iteration": 2, "policy": "/gone"}):
        pass
    with pytest.raises(ConfigError, match="/gone as its best policy, which is gone"):
        policies_of(tmp_path)


def test_a_run_is_served_with_its_own_speech_stack(tmp_path: Path):
    write_recipe(
        tmp_path / "mine",
        codec={"kind": "encodec", "path": "my/encodec"},
        nar="my/nar",
        golden="my/golden.parquet",
        rendering={"num_levels": 5},
        prompts={"speaker_frames": 90},
    )
    commit_policy(tmp_path / "mine", 1)
    file = read_endpoint(FILE, None, [], None).config
    config = read_endpoint(FILE, tmp_path / "mine", [], None).config
    assert config.codec == EncodecPackageConfig(path=Path("my/encodec").resolve())
    assert config.nar == Path("my/nar").resolve()
    assert config.rendering.num_levels == 5
    voices = config.voices
    assert (voices.golden, voices.speaker_frames) == (Path("my/golden.parquet").resolve(), 90)
    assert (dict(voices.aliases), voices.uploads) == ({}, file.voices.uploads)
    overrides = ["nar=other", "rendering.num_levels=2", "voices.aliases={alloy: me}"]
    changed = read_endpoint(FILE, tmp_path / "mine", overrides, None).config
    assert changed.nar == Path("other").resolve()
    assert (changed.rendering.num_levels, changed.voices.aliases) == (2, {"alloy": "me"})
    bare = read_endpoint(FILE, BASE, [], None).config
    assert bare.model_copy(update={"policies": file.policies}) == file


@pytest.mark.parametrize(
    ("model", "resolved"),
    [("jobs", str(Path("jobs").resolve())), ("facebook/encodec_24khz", "facebook/encodec_24khz")],
)
def test_a_codecs_folder_is_the_same_in_every_process_and_a_name_on_a_hub_stays(
    model: str, resolved: str
):
    override = f"codec={{kind: encodec_hf, model: {model}}}"
    codec = read_endpoint(FILE, None, [override], None).config.codec
    assert codec == EncodecHfConfig(model=resolved)


def test_a_run_of_the_shipped_recordings_keeps_the_names_of_their_voices(tmp_path: Path):
    write_recipe(tmp_path)
    commit_policy(tmp_path, 1)
    file = read_endpoint(FILE, None, [], None).config
    assert read_endpoint(FILE, tmp_path, [], None).config.voices == file.voices


def test_replicas_that_can_never_all_start_are_refused_before_one_does(
    monkeypatch: pytest.MonkeyPatch,
):
    def possible() -> dict[str, float]:
        return {"CPU": 2.0}

    def start(_endpoint: Endpoint) -> None:
        raise AssertionError("Serve was started")

    monkeypatch.setattr("speechalign.pipeline.serve.connected", nullcontext)
    monkeypatch.setattr("speechalign.pipeline.serve._start_serve", start)
    monkeypatch.setattr("speechalign.pipeline.serve.possible_resources", possible)
    for override, says in (
        # 0.25 + 0.25 + 2 x 1
        ("speaker_replicas={min_replicas: 2, max_replicas: 2, num_cpus: 1}",
         r"wants 2\.5 CPU \(ingress 0\.25, renderer 0\.25, speaker-base 2\), the cluster has 2;"),
        ("renderer_replicas.num_gpus=1", r"wants 1 GPU \(.*renderer 1, .*the cluster has 0;"),
    ):  # fmt: skip
        endpoint = read_endpoint(FILE, None, [override], None)
        with pytest.raises(ConfigError, match=says), deployed(endpoint):
            pass
    with pytest.raises(AssertionError, match="was started"), deployed(
        read_endpoint(FILE, None, [], None)
    ):  # fmt: skip
        pass


def serve_says(status: str, speaker: str) -> SimpleNamespace:
    """Return what `serve.status` does, as far as it is looked at."""
    deployments = {
        name: SimpleNamespace(status=SimpleNamespace(value=value), message=message)
        for name, value, message in (
            ("ingress", "HEALTHY", "fine"),
            ("speaker-base", speaker, "1 replica waits for 1 GPU"),
        )
    }
    ours = SimpleNamespace(status=status, message="", deployments=deployments)
    return SimpleNamespace(applications={"speechalign": ours})


def test_what_serve_waits_for_is_said_while_it_waits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    answers = iter([serve_says("DEPLOYING", "UPDATING"), serve_says("RUNNING", "HEALTHY")])
    for name, instead in (
        ("speechalign.pipeline.serve.connected", nullcontext),
        ("speechalign.pipeline.serve._check_room", ignored),
        ("speechalign.pipeline.serve._start_serve", ignored),
        ("speechalign.pipeline.serve._serve_client", lambda: _Client()),
        ("speechalign.pipeline.serve.POLL_S", 0.0),
        ("speechalign.pipeline.serve.SAY_S", 0.0),
        ("ray.serve.status", lambda: next(answers)),
    ):
        monkeypatch.setattr(name, instead)
    caplog.set_level(logging.INFO)
    with deployed(read_endpoint(FILE, None, [], None), stays=True):
        pass
    assert [record.getMessage() for record in caplog.records] == [
        "Serve is not done yet: speaker-base UPDATING 1 replica waits for 1 GPU"
    ]


def ignored(_: object) -> None:
    pass


class _Client:
    """Serve's, which only listens."""

    def deploy_apps(self, _: object) -> None:
        pass


class Tells(logging.Handler):
    """Tells this process to end as soon as it says that it speaks."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("speaking at"):
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def told_to_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Iterator[Callable[[Callable[[], None]], None]]:
    """Serves nothing until it is told to end, and drains as it is told."""
    logger, handler = logging.getLogger("speechalign.pipeline.serve"), Tells()
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    @contextmanager
    def nothing(_endpoint: Endpoint) -> Iterator[str]:
        yield "http://127.0.0.1:8000"

    def run(drain: Callable[[], None]) -> None:
        monkeypatch.setattr("speechalign.pipeline.serve.deployed", nothing)

        def drained(_endpoint: Endpoint) -> None:
            drain()

        monkeypatch.setattr("speechalign.pipeline.serve._drain", drained)
        serve_until_told(read_endpoint(FILE, None, [], None))

    logger.addHandler(handler)
    caplog.set_level(logging.INFO)
    yield run
    logger.removeHandler(handler)
    for number, one in former.items():
        signal.signal(number, one)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_is_told_to_end_again_does_not_wait_for_open_streams(
    told_to_end: Callable[[Callable[[], None]], None], number: signal.Signals
):
    def drain() -> None:
        os.kill(os.getpid(), number)
        time.sleep(60)

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        told_to_end(drain)
    assert time.monotonic() - began < 30


class _Slow(_Client):
    """Serve's while a stream is open; it ends in 30 s unless it is waited for less long."""

    def __init__(self) -> None:
        self.waited_s: list[float] = []

    def shutdown(self, timeout_s: float = 30.0) -> None:
        if not self.waited_s:  # as Serve, which does nothing the second time
            self.waited_s.append(timeout_s)


def test_serve_too_is_not_waited_for_by_who_is_told_twice(monkeypatch: pytest.MonkeyPatch):
    client = _Slow()
    for name, instead in (
        ("speechalign.pipeline.serve.connected", nullcontext),
        ("speechalign.pipeline.serve._check_room", ignored),
        ("speechalign.pipeline.serve._start_serve", ignored),
        ("speechalign.pipeline.serve._serve_client", lambda: client),
        ("ray.serve.status", lambda: serve_says("RUNNING", "HEALTHY")),
        ("ray.serve.shutdown", client.shutdown),
    ):
        monkeypatch.setattr(name, instead)
    endpoint = read_endpoint(FILE, None, [], None)
    with pytest.raises(KeyboardInterrupt), deployed(endpoint):
        raise KeyboardInterrupt
    assert client.waited_s == [1.0]
    client.waited_s.clear()
    with pytest.raises(KeyboardInterrupt), deployed(endpoint, stays=True):
        raise KeyboardInterrupt
    assert client.waited_s == []
    with deployed(endpoint):
        pass
    assert client.waited_s == [30.0]


def test_the_longest_input_can_be_spoken_while_an_endpoint_ends():
    config = read_endpoint(FILE, None, [], None).config
    assert config.limits.max_input_characters / 14 == pytest.approx(292.6, abs=0.05)
    assert config.drain_s >= 293


def test_parts_of_another_codec_and_missing_parts_are_refused(tmp_path: Path):
    for override, says in (
        (f"policies.base.path={tmp_path}/none", "holds no policy"),
        ("policies.base.path=speechalign/assets/nar", "not an AR policy"),
        ("voices.golden=nowhere.parquet", "do not exist"),
        ("voices.speakers=[nobody]", "of nobody"),
        ("voices.aliases={alloy: nobody}", "name no voice"),
    ):
        with pytest.raises(ConfigError, match=says):
            check_endpoint(read_endpoint(FILE, None, [override], None).config)


def test_a_reward_model_of_another_codec_or_none_is_refused_before_a_process_starts(
    tmp_path: Path,
):
    policy = load_ar(BASE)
    model, fingerprint = RewardModel(policy.model), policy.facts["codec_fingerprint"]
    for name, codec in (("good", fingerprint), ("other", "f" * 16)):
        save_reward_model(tmp_path / name, model, policy.vocabulary, {"codec_fingerprint": codec})

    def check(folder: Path) -> None:
        override = f"policies.base.reward_model={folder}"
        check_endpoint(read_endpoint(FILE, None, [override], None).config)

    check(tmp_path / "good")
    with pytest.raises(
        DataError,
        match=f"other was trained on codec f+, and has to judge codes of codec {fingerprint}",
    ):
        check(tmp_path / "other")
    for folder in (tmp_path / "none", BASE.resolve()):
        with pytest.raises(ConfigError, match="reward model"):
            check(folder)


def test_what_the_file_says_of_the_proxies_is_said_to_serve():
    told = read_endpoint(FILE, None, [], "127.0.0.1:9").to_serve()
    assert told["http_options"] == {"host": "127.0.0.1", "port": 9, "keep_alive_timeout_s": 90}
    assert told["proxy_location"] == "HeadOnly"


def changed_file(folder: Path, top: dict[str, Any], application: dict[str, Any]) -> Path:
    values = yaml.safe_load(FILE.read_text()) | top
    values["applications"][0] |= application
    (folder / "serve.yaml").write_text(yaml.safe_dump(values))
    return folder / "serve.yaml"


def test_where_the_proxies_are_and_their_certificate_are_carried(tmp_path: Path):
    http_options = {"ssl_keyfile": "key.pem", "ssl_certfile": "cert.pem"}
    top = {"proxy_location": "EveryNode", "http_options": http_options}
    endpoint = read_endpoint(changed_file(tmp_path, top, {}), None, [], None)
    told = endpoint.to_serve()
    assert told["proxy_location"] == "EveryNode"
    assert told["http_options"] == http_options | {"host": "127.0.0.1", "port": 8000}
    assert endpoint.address == "https://127.0.0.1:8000"


@pytest.mark.parametrize(
    ("top", "application", "key"),
    [
        ({"grpc_options": {"port": 9000}}, {}, "grpc_options"),
        ({}, {"deployments": [{"name": "speaker-base"}]}, "applications.deployments"),
        ({}, {"runtime_env": {"env_vars": {"A": "1"}}}, "applications.runtime_env"),
        ({}, {"import_path": "theirs:app"}, "applications.import_path"),
        ({}, {"route_prefix": "/tts"}, "applications.route_prefix"),
        ({}, {"name": "tts"}, "applications.name"),
    ],
)
def test_what_would_be_ignored_is_refused_by_its_name(
    tmp_path: Path, top: dict[str, Any], application: dict[str, Any], key: str
):
    with pytest.raises(ConfigError, match=f"would ignore {key};"):
        read_endpoint(changed_file(tmp_path, top, application), None, [], None)


def test_a_swap_is_the_user_config_of_the_policys_deployment():
    swapped = read_endpoint(FILE, None, [], None).with_policy("base", Path("next"))
    (deployment,) = swapped.to_serve()["applications"][0]["deployments"]
    assert deployment["name"] == "speaker-base"
    assert deployment["user_config"]["path"] == "next"


def test_the_command_takes_overrides_without_a_policy():
    told = CliRunner().invoke(app, ["serve", "speaking.temperature=0.5", "--dry-run"])
    assert told.exit_code == 0
    assert yaml.safe_load(told.output)["speaking"]["temperature"] == 0.5
