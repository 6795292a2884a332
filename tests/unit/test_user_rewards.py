"""Rewards of the user's own, in Python and behind an address: what fails is missing, never zero."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from speechalign.config.judges import HttpJudgeConfig, PythonJudgeConfig, listens
from speechalign.errors import ConfigError, DataError
from speechalign.judges.base import Judgement
from speechalign.judges.http import HttpJudge
from speechalign.judges.user_code import UserJudge, UserReward, load_user_class
from speechalign.rewards.user_tokens import UserTokenStage
from speechalign.types import Clip, Measured, TokenAnswer, Unmeasured


def a_config(name: str, **changes: Any) -> PythonJudgeConfig:
    values = {"name": "mine", "target": f"tests.user_rewards:{name}", "reads": "tokens"}
    return PythonJudgeConfig.model_validate(values | changes)


def an_answer(text: str = "good") -> TokenAnswer:
    return TokenAnswer(
        sample_id="p/0", text=text, prompt_token_ids=(2,), token_ids=(8, 20, 1), is_truncated=False
    )


def a_clip(index: int) -> Clip:
    return Clip(
        sample_id=f"p{index}/0",
        text=f"text {index}",
        waveform_N=np.full(1600, 0.5, np.float32),
        reference_waveform_N=np.zeros(1600, np.float32),
        sample_rate_hz=16000,
        golden_duration_s=0.1,
    )


def test_a_reward_is_made_once_with_its_arguments_and_asked_about_batches():
    reward = UserReward(a_config("ShareOfLowTokens", arguments={"limit": 10}))
    assert reward.scores([an_answer()] * 2) == [Measured(2 / 3)] * 2


def test_nothing_and_what_is_no_number_is_missing():
    scores = UserReward(a_config("Odd")).scores([an_answer()] * 4)
    assert scores == [
        Unmeasured("mine: it returned nothing"),
        Unmeasured("mine: nan is no number"),
        Unmeasured("mine: inf is no number"),
        Measured(2.0),
    ]


def test_an_exception_takes_only_the_bad_sample():
    answers = [an_answer(), an_answer("bad"), an_answer()]
    assert UserReward(a_config("Fragile")).scores(answers) == [
        Measured(1.0),
        Unmeasured("mine: RuntimeError: I cannot read this"),
        Measured(1.0),
    ]


def test_a_wrong_number_of_values_is_an_error():
    with pytest.raises(DataError, match="returned 1 values for 2 samples"):
        UserReward(a_config("TooFew")).scores([an_answer()] * 2)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("tests.no_such:Reward", "cannot be imported"),
        ("tests.user_rewards:NoSuch", "cannot be imported"),
        ("tests.user_rewards:not_callable", "no class or function"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused(target: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_user_class(a_config("Odd", target=target))


def test_a_reward_of_sound_is_a_judge():
    config = a_config("Duration", reads="sound")
    assert listens(config)
    assert not listens(a_config("Odd"))
    assert UserJudge(config).judge([a_clip(0)]) == [{"mine": 0.1}]


def test_a_reward_of_tokens_is_a_stage_that_needs_no_sound():
    table = pa.table(
        {
            "prompt_id": ["a", "b"],
            "sample_index": [0, 0],
            "text": ["good", "bad"],
            "prompt_token_ids": [[2], [2]],
            "token_ids": [[8], [9]],
            "is_truncated": [False, False],
        }
    )
    judged = UserTokenStage(a_config("Fragile"))(table)
    assert judged["mine"].to_pylist() == [1.0, None]
    assert judged["judge_errors"].to_pylist() == ["", "mine: RuntimeError: I cannot read this"]


Answer = Callable[[int, dict[str, Any]], tuple[int, bytes]]


def always(status: int, content: bytes = b"") -> Answer:
    def answer(count: int, body: dict[str, Any]) -> tuple[int, bytes]:
        del count, body
        return status, content

    return answer


@contextmanager
def a_server(answer: Answer) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append({"authorization": self.headers["Authorization"]} | body)
            status, content = answer(len(requests), body)
            try:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(content)
            except BrokenPipeError:  # the client did not wait
                pass

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/score", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def rewards(*values: float | None) -> bytes:
    return json.dumps({"rewards": values}).encode()


def judged(url: str, count: int, **changes: Any) -> list[Judgement]:
    settings = {"name": "remote", "url": url, "batch_size": 2, "backoff_s": 0.0}
    judge = HttpJudge(HttpJudgeConfig.model_validate(settings | changes))
    return judge.judge([a_clip(index) for index in range(count)])


def test_clips_are_sent_in_batches_and_null_is_missing():
    with a_server(lambda _, body: (200, rewards(*[None, 1.5][: len(body["samples"])]))) as (
        url,
        requests,
    ):
        found = judged(url, 3)
    assert found == [
        Unmeasured("remote: it was not judged"),
        {"remote": 1.5},
        Unmeasured("remote: it was not judged"),
    ]
    assert [len(request["samples"]) for request in requests] == [2, 1]
    sample = requests[1]["samples"][0]
    assert (sample["id"], sample["text"], sample["sample_rate_hz"]) == ("p2/0", "text 2", 16000)
    assert sample["audio_wav_base64"].startswith("UklGR")  # RIFF


def test_a_busy_server_is_asked_again():
    def busy_twice(count: int, _: object) -> tuple[int, bytes]:
        return (503, b"") if count < 3 else (200, rewards(1.0))

    with a_server(busy_twice) as (url, requests):
        assert judged(url, 1) == [{"remote": 1.0}]
    assert len(requests) == 3


def test_retries_are_bounded_and_then_the_samples_are_missing():
    with a_server(always(500)) as (url, requests):
        assert judged(url, 2, max_retries=2) == [Unmeasured("remote: HTTP 500")] * 2
    assert len(requests) == 3


def test_a_refusal_is_not_asked_again():
    with a_server(always(401)) as (url, requests):
        assert judged(url, 1) == [Unmeasured("remote: HTTP 401")]
    assert len(requests) == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"<html>", 'the answer is not {"rewards": [...]}'),
        (b"[1.0]", 'the answer is not {"rewards": [...]}'),
        (rewards(1.0, 2.0), "2 rewards for 1 samples"),
        (b'{"rewards": ["high"]}', "it was not judged"),
        (b'{"rewards": [NaN]}', "it was not judged"),
    ],
)
def test_an_answer_that_cannot_be_read_is_missing(content: bytes, reason: str):
    with a_server(always(200, content)) as (url, _):
        assert judged(url, 1) == [Unmeasured(f"remote: {reason}")]


def test_a_server_that_does_not_answer_in_time_is_missing():
    def slow(*_: object) -> tuple[int, bytes]:
        time.sleep(0.5)
        return 200, rewards(1.0)

    with a_server(slow) as (url, _):
        (found,) = judged(url, 1, timeout_s=0.05, max_retries=0)
    assert isinstance(found, Unmeasured)
    assert "ReadTimeout" in found.reason


def test_the_token_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="MY_TOKEN is not set"):
        judged("http://127.0.0.1:9", 1, token_env="MY_TOKEN")
    monkeypatch.setenv("MY_TOKEN", "secret")
    with a_server(always(200, rewards(1.0))) as (url, requests):
        judged(url, 1, token_env="MY_TOKEN")
    assert requests[0]["authorization"] == "Bearer secret"
