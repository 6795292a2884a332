"""What `speechalign serve` is told, and what it refuses before anything starts."""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from speechalign.artifacts import committed_folder
from speechalign.cli import app
from speechalign.errors import ConfigError
from speechalign.pipeline.serve import policies_of, read_endpoint
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


def test_a_swap_is_the_user_config_of_the_policys_deployment():
    swapped = read_endpoint(FILE, None, [], None).with_policy("base", Path("next"))
    (deployment,) = swapped.to_serve()["applications"][0]["deployments"]
    assert deployment["name"] == "speaker-base"
    assert deployment["user_config"]["path"] == "next"


def test_the_command_takes_overrides_without_a_policy():
    told = CliRunner().invoke(app, ["serve", "speaking.temperature=0.5", "--dry-run"])
    assert told.exit_code == 0
    assert yaml.safe_load(told.output)["speaking"]["temperature"] == 0.5
