"""What `speechalign serve` is told, and what it refuses before anything starts."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from speechalign.artifacts import committed_folder
from speechalign.cli import app
from speechalign.errors import ConfigError, DataError
from speechalign.pipeline.serve import policies_of, read_endpoint
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


@pytest.mark.parametrize("listen", ["8000", "host:", "host:http", "127.0.0.1:70000", ""])
def test_what_is_no_address_is_refused(listen: str):
    with pytest.raises(ConfigError, match="no address to listen at"):
        read_endpoint(FILE, None, [], listen)


def test_a_policy_is_served_alone_and_a_run_beside_its_start(tmp_path: Path):
    assert policies_of(BASE) == {"policy": BASE}
    recipe = yaml.safe_load(Path("jobs/align-embedded-cpu.yaml").read_text())
    recipe["pipeline"]["iterations"] = 2
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ConfigError, match="no run with a trained one"):
        policies_of(tmp_path)
    for number in (1, 2):
        with committed_folder(tmp_path / f"iteration-{number}" / "policy", {"kind": "ar"}):
            pass
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
