"""A reward behind an HTTP address.

    POST url   {"samples": [{"id", "text", "audio_wav_base64", "sample_rate_hz"}, ...]}
    answer     {"rewards": [0.5, null, ...]}     a number for each sample, null: not judged

A request that is not answered in time, or with 429 or 5xx, is sent again, a bounded number of
times, ever later; then its samples have no reward, with the reason. So it is with an answer that
cannot be read. Nothing becomes a zero. The audio is mono 16-bit WAV; one without frames is a
sample that says nothing.
"""

import base64
import io
import math
import os
import time
from collections.abc import Sequence
from typing import Any

import httpx
import soundfile as sf

from speechalign.config.judges import HttpJudgeConfig
from speechalign.errors import ConfigError
from speechalign.judges.base import Judgement
from speechalign.types import Clip, Unmeasured

TOO_MANY_REQUESTS = 429
SERVER_ERROR = 500
LONGEST_VALUE = 80
"""Characters of a wrong value that a reason quotes."""


def headers_of(config: HttpJudgeConfig) -> dict[str, str]:
    """Return the headers of every request: the bearer token, if there is one.

    No message of this function, or of what is sent later, has the token in it: httpx quotes
    headers that it refuses, so what it would refuse is refused here.

    Raises:
        ConfigError: the environment variable is not set, or holds what no header can.
    """
    if not config.token_env:
        return {}
    token = os.environ.get(config.token_env, "").strip()
    if not token:
        raise ConfigError(
            f"judge {config.name!r}: the environment variable {config.token_env} is not set; set "
            "it to the token, on every node"
        )
    if not (token.isascii() and token.isprintable()):
        raise ConfigError(
            f"judge {config.name!r}: the token in {config.token_env} has characters that cannot "
            "be sent; a bearer token is one line of ASCII"
        )
    return {"Authorization": f"Bearer {token}"}


class HttpJudge:
    """A judge that sends clips away."""

    remarks: tuple[str, ...] = ()

    def __init__(self, config: HttpJudgeConfig) -> None:
        self._config = config
        self.name = config.name
        self.measures = (config.name,)
        self._client = httpx.Client(timeout=config.timeout_s, headers=headers_of(config))

    def judge(self, clips: Sequence[Clip]) -> list[Judgement]:
        """Return one judgement a clip."""
        size = self._config.batch_size
        return [
            judgement
            for first in range(0, len(clips), size)
            for judgement in self._judge(clips[first : first + size])
        ]

    def _judge(self, clips: Sequence[Clip]) -> list[Judgement]:
        body = {"samples": [_sample(clip) for clip in clips]}
        answer = self._ask(body)
        if isinstance(answer, str):
            return [Unmeasured(f"{self.name}: {answer}")] * len(clips)
        rewards = _rewards_in(answer)
        if rewards is None:
            reason = f'{self.name}: the answer is not {{"rewards": [...]}}'
            return [Unmeasured(reason)] * len(clips)
        if len(rewards) != len(clips):
            reason = f"{self.name}: {len(rewards)} rewards for {len(clips)} samples"
            return [Unmeasured(reason)] * len(clips)
        return [self._judgement(reward) for reward in rewards]

    def _judgement(self, reward: Any) -> Judgement:
        if reward is None:
            return Unmeasured(f"{self.name}: it was not judged")
        if isinstance(reward, float) and math.isfinite(reward):
            return {self.name: reward}
        return Unmeasured(f"{self.name}: {repr(reward)[:LONGEST_VALUE]} is no number")

    def _ask(self, body: Any) -> httpx.Response | str:
        """Return the answer, or why there is none."""
        reason = ""
        for attempt in range(self._config.max_retries + 1):
            if attempt:
                time.sleep(self._config.backoff_s * 2 ** (attempt - 1))
            try:
                answer = self._send(body)
            except httpx.TransportError as error:
                reason = f"{type(error).__name__} {error}".strip()
                continue
            except (httpx.RequestError, httpx.InvalidURL) as error:  # as wrong the next time
                return f"{type(error).__name__} {error}".strip()
            if answer.is_success:
                return answer
            reason = f"HTTP {answer.status_code}"
            if answer.status_code != TOO_MANY_REQUESTS and answer.status_code < SERVER_ERROR:
                break
        return reason

    def _send(self, body: Any) -> httpx.Response:
        """Return the whole answer, in time: httpx's own limit is on the wait for a piece of it."""
        deadline_s = time.monotonic() + self._config.timeout_s
        with self._client.stream("POST", self._config.url, json=body) as answer:
            content = bytearray()
            for piece in answer.iter_bytes():
                content += piece
                if time.monotonic() > deadline_s:
                    raise httpx.ReadTimeout("the answer did not end in time")
        return httpx.Response(answer.status_code, content=bytes(content))


def _rewards_in(answer: httpx.Response) -> list[Any] | None:
    """Return the list of an answer, every number in it a float, or nothing."""
    try:
        rewards = answer.json(parse_int=float)["rewards"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return rewards if isinstance(rewards, list) else None


def _sample(clip: Clip) -> dict[str, Any]:
    buffer = io.BytesIO()
    sf.write(buffer, clip.waveform_N, clip.sample_rate_hz, format="WAV", subtype="PCM_16")
    return {
        "id": clip.sample_id,
        "text": clip.text,
        "audio_wav_base64": base64.b64encode(buffer.getvalue()).decode(),
        "sample_rate_hz": clip.sample_rate_hz,
    }
