"""Who is let in, and how often."""

from pathlib import Path

import pytest

from speechalign.config.serving import AccessConfig, LimitsConfig
from speechalign.errors import ConfigError
from speechalign.serving.keys import ApiKey, Gate, read_keys
from speechalign.serving.problems import Problem

KEY, OTHER = "k" * 16, "o" * 16


class Clock:
    """A time that tests move."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def gate(clock: Clock, **limits: int) -> Gate:
    keys = [ApiKey(name="a", key=KEY, requests_per_minute=2), ApiKey(name="b", key=OTHER)]
    return Gate(keys, LimitsConfig.model_validate(limits), clock)


def test_a_known_key_is_let_in_under_its_own_name():
    assert gate(Clock()).admit(f"Bearer {OTHER}").name == "b"


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", f"Basic {KEY}", "Bearer wrong"])
def test_without_a_good_key_there_is_401(header: str | None):
    with pytest.raises(Problem) as caught:
        gate(Clock()).admit(header)
    assert caught.value.status == 401
    assert caught.value.headers == {"WWW-Authenticate": "Bearer"}
    assert caught.value.to_json()["error"]["code"] == "invalid_api_key"


def test_a_key_has_so_many_requests_a_minute_and_gets_them_back():
    clock = Clock()
    door = gate(clock)
    for _ in range(2):
        door.admit(f"Bearer {KEY}")
    with pytest.raises(Problem) as caught:
        door.admit(f"Bearer {KEY}")
    assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "31"})
    door.admit(f"Bearer {OTHER}")
    clock.now += 30
    door.admit(f"Bearer {KEY}")


def test_keys_come_from_a_file_and_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "keys.yaml").write_text(f"- {{name: team, key: {KEY}, max_upload_bytes: 5}}\n")
    monkeypatch.setenv("SPEECHALIGN_API_KEYS", f"web:{OTHER},{'x' * 20}")
    keys = read_keys(AccessConfig(keys_file=tmp_path / "keys.yaml"))
    assert [(key.name, key.key, key.max_upload_bytes) for key in keys] == [
        ("team", KEY, 5),
        ("web", OTHER, None),
        ("key-2", "x" * 20, None),
    ]


def test_an_endpoint_without_keys_is_refused_unless_it_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SPEECHALIGN_API_KEYS", raising=False)
    with pytest.raises(ConfigError, match="has no API keys"):
        read_keys(AccessConfig())
    assert read_keys(AccessConfig(allow_anonymous=True)) == []
    assert Gate([], LimitsConfig()).admit(None).name == "anonymous"


@pytest.mark.parametrize(
    "text", ["name: x", f"- {{name: x, key: short}}\n- {{key: {KEY}}}", "- [", ""]
)
def test_a_bad_file_of_keys_is_refused_without_showing_a_key(tmp_path: Path, text: str):
    (tmp_path / "keys.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_keys(AccessConfig(keys_file=tmp_path / "keys.yaml"))
    assert "keys.yaml" in str(caught.value)
    assert KEY not in str(caught.value)
    assert "short" not in str(caught.value).replace("shorter", "")


def test_a_file_of_keys_that_is_no_text_is_refused(tmp_path: Path):
    (tmp_path / "keys.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"keys\.yaml cannot be read: UnicodeDecodeError"):
        read_keys(AccessConfig(keys_file=tmp_path / "keys.yaml"))


def test_two_keys_of_one_name_and_short_keys_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "keys.yaml").write_text(f"- {{name: a, key: {KEY}}}\n- {{name: a, key: {OTHER}}}")
    with pytest.raises(ConfigError, match="same name"):
        read_keys(AccessConfig(keys_file=tmp_path / "keys.yaml"))
    monkeypatch.setenv("SPEECHALIGN_API_KEYS", "web:short")
    with pytest.raises(ConfigError, match="key 1 of SPEECHALIGN_API_KEYS is shorter"):
        read_keys(AccessConfig())
