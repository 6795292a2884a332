"""Who may ask, and how much.

A key is looked for among all keys in constant time, and is never logged; its name is.
"""

import hashlib
import hmac
import os
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from speechalign.config.base import Config
from speechalign.config.serving import AccessConfig, LimitsConfig
from speechalign.errors import ConfigError
from speechalign.serving.problems import too_many, unauthorised

MIN_KEY_CHARACTERS = 16


class ApiKey(Config):
    """A key and what is special about it; a limit that is not given is the endpoint's."""

    name: str
    key: str = Field(min_length=MIN_KEY_CHARACTERS, repr=False)
    requests_per_minute: int | None = Field(default=None, gt=0)
    max_input_characters: int | None = Field(default=None, gt=0)
    max_upload_bytes: int | None = Field(default=None, gt=0)


ANONYMOUS = ApiKey(name="anonymous", key="-" * MIN_KEY_CHARACTERS)


def read_keys(config: AccessConfig) -> list[ApiKey]:
    """Return the keys of the file and of the environment.

    Raises:
        ConfigError: a file that cannot be read, a short key, two keys of one name, or no key at
            all where anonymous clients are not allowed.
    """
    keys = [*_keys_of_file(config.keys_file), *_keys_of_environment(config.keys_env)]
    names = [key.name for key in keys]
    if len(set(names)) < len(names):
        raise ConfigError("two API keys have the same name; requests are counted by name")
    if not keys and not config.allow_anonymous:
        raise ConfigError(
            "the endpoint has no API keys: anybody who reaches it could use it; set "
            f"access.keys_file or {config.keys_env}, or, where nobody else can reach it, "
            "access.allow_anonymous"
        )
    return keys


def _keys_of_file(path: Path | None) -> list[ApiKey]:
    if path is None:
        return []
    try:
        return TypeAdapter(list[ApiKey]).validate_python(yaml.safe_load(path.read_text()))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the API keys in {path} cannot be read: {type(error).__name__}"
        ) from None
    except ValidationError as error:  # its text would show the keys
        where = ", ".join(".".join(map(str, one["loc"])) for one in error.errors())
        raise ConfigError(
            f"{path} is not a list of API keys: look at {where}; each has a name and a key of at "
            f"least {MIN_KEY_CHARACTERS} characters"
        ) from None


def _keys_of_environment(variable: str) -> list[ApiKey]:
    keys: list[ApiKey] = []
    entries = [entry for entry in os.environ.get(variable, "").split(",") if entry.strip()]
    for number, entry in enumerate(entries):
        name, separator, key = entry.strip().rpartition(":")
        if len(key) < MIN_KEY_CHARACTERS:
            raise ConfigError(
                f"key {number + 1} of {variable} is shorter than {MIN_KEY_CHARACTERS} characters"
            )
        keys.append(ApiKey(name=name if separator else f"key-{number + 1}", key=key))
    return keys


class Gate:
    """Lets requests in, one replica's share of them."""

    def __init__(
        self,
        keys: list[ApiKey],
        limits: LimitsConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keys = [(_digest(key.key), key) for key in keys]
        self._limits, self._clock = limits, clock
        self._budgets: dict[str, tuple[float, float]] = {}

    def admit(self, authorization: str | None) -> ApiKey:
        """Return the key of a request.

        Raises:
            Problem: 401 without a good key, 429 when the key has no requests left this minute.
        """
        key = self._key_of(authorization)
        self._spend(key)
        return key

    def _key_of(self, authorization: str | None) -> ApiKey:
        if not self._keys:
            return ANONYMOUS
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            raise unauthorised("give an API key in the header: Authorization: Bearer KEY")
        digest = _digest(given.strip())
        found = [key for known, key in self._keys if hmac.compare_digest(known, digest)]
        if not found:
            raise unauthorised("the API key is not known here")
        return found[0]

    def _spend(self, key: ApiKey) -> None:
        """Take one request from a bucket that a minute fills."""
        most = key.requests_per_minute or self._limits.requests_per_minute
        now = self._clock()
        left, then = self._budgets.get(key.name, (float(most), now))
        left = min(most, left + (now - then) * most / 60)
        if left < 1:
            self._budgets[key.name] = (left, now)
            wait_s = int((1 - left) * 60 / most) + 1
            message = f"more than {most} requests a minute with this key; come back in {wait_s} s"
            raise too_many(message, "rate_limit_exceeded", wait_s)
        self._budgets[key.name] = (left - 1, now)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
