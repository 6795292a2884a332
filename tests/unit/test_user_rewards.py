"""Rewards of the user's own, in Python and behind an address: what fails is missing, never zero."""

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import soundfile as sf

from speechalign.config.judges import HttpJudgeConfig, PythonJudgeConfig, RewardConfig, listens
from speechalign.errors import BudgetExceeded, ConfigError, DataError
from speechalign.judges.base import SILENT, Judgement
from speechalign.judges.http import HttpJudge
from speechalign.judges.user_code import UserJudge, UserReward, load_user_class
from speechalign.rewards.combine import check_budget, rewards_of
from speechalign.rewards.stage import JudgeStage
from speechalign.rewards.user_tokens import UserTokenStage
from speechalign.types import Clip, Measured, TokenAnswer, Unmeasured
from tests.user_rewards import Hangs


def a_config(name: str, **changes: Any) -> PythonJudgeConfig:
    values = {"name": "mine", "target": f"tests.user_rewards:{name}", "reads": "tokens"}
    return PythonJudgeConfig.model_validate(values | changes)


def an_answer(text: str = "good") -> TokenAnswer:
    return TokenAnswer(
        sample_id="p/0", text=text, prompt_token_ids=(2,), token_ids=(8, 20, 1), is_truncated=False
    )


def token_rows() -> pa.Table:
    return pa.table(
        {
            "prompt_id": ["a", "b"],
            "sample_index": [0, 0],
            "text": ["good", "bad"],
            "prompt_token_ids": [[2], [2]],
            "token_ids": [[8], [9]],
            "is_truncated": [False, False],
        }
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
        Unmeasured("mine: the reward returned nothing"),
        Unmeasured("mine: nan is no number"),
        Unmeasured("mine: inf is no number"),
        Measured(2.0),
    ]


def test_a_value_of_another_type_takes_only_its_sample():
    scores = UserReward(a_config("Wordy")).scores([an_answer()] * 4)
    assert scores[:2] == [
        Unmeasured("mine: 'high' is no number"),
        Unmeasured("mine: [1.0] is no number"),
    ]
    assert scores[2] == Unmeasured("mine: 1" + "0" * 79 + " is no number")  # the reason is cut
    assert scores[3] == Measured(1.0)


def test_an_exception_takes_only_the_bad_sample():
    answers = [an_answer(), an_answer("bad"), an_answer()]
    assert UserReward(a_config("Fragile")).scores(answers) == [
        Measured(1.0),
        Unmeasured("mine: RuntimeError: I cannot read this"),
        Measured(1.0),
    ]


@pytest.fixture
def hangs() -> Iterator[threading.Event]:
    """What lets the reward that hangs go on."""
    Hangs.released.clear()
    yield Hangs.released
    Hangs.released.set()


def judge_threads() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == "judge mine"]


def test_a_reward_that_hangs_is_missing_at_once_until_it_returns(hangs: threading.Event):
    before = len(judge_threads())
    reward = UserReward(a_config("Hangs", timeout_s=1.0))
    assert reward.scores([an_answer()] * 2) == [Unmeasured("mine: no answer within 1 s")] * 2
    began = time.monotonic()
    missing = [Unmeasured("mine: it has not returned from an earlier batch")]
    assert [reward.scores([an_answer()]) for _ in range(20)] == [missing] * 20
    assert time.monotonic() - began < 10
    assert len(judge_threads()) == before + 1
    assert all(thread.daemon for thread in judge_threads())  # the process ends all the same
    hangs.set()
    deadline = time.monotonic() + 30
    while (scores := reward.scores([an_answer()])) == missing:
        assert time.monotonic() < deadline
    assert scores == [Measured(1.0)]


@pytest.mark.usefixtures("hangs")
def test_a_reward_that_never_returns_ends_by_the_failure_budget():
    stage = UserTokenStage(a_config("Hangs", timeout_s=0.05))
    rows = [row for _ in range(2) for row in stage(token_rows()).to_pylist()]
    assert [row["mine"] for row in rows] == [None] * 4
    config = RewardConfig.model_validate({"terms": [{"measure": "mine", "weight": 1.0}]})
    with pytest.raises(BudgetExceeded, match=r"mine: no answer within 0\.05 s"):
        check_budget(rewards_of(rows, config), config)


def test_a_reward_is_asked_in_the_thread_that_made_it():
    assert UserReward(a_config("OfOneThread")).scores([an_answer()]) == [Measured(1.0)]


def test_a_wrong_number_of_values_is_an_error():
    with pytest.raises(DataError, match="returned 1 values for 2 samples"):
        UserReward(a_config("TooFew")).scores([an_answer()] * 2)
    with pytest.raises(DataError, match="returned None for 2 samples"):
        UserReward(a_config("Forgetful")).scores([an_answer()] * 2)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("tests.no_such:Reward", "cannot be imported"),
        ("tests.user_rewards:NoSuch", "cannot be imported"),
        ("tests.user_rewards:not_callable", "is no class"),
        ("tests.user_rewards:a_function", "is no class"),
        ("tests.user_rewards:NotCallable", "has no __call__"),
    ],
)
def test_a_path_that_leads_to_no_reward_is_refused(target: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_user_class(a_config("Odd", target=target))


def test_a_module_that_raises_when_imported_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "raises_on_import.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot be imported \(ZeroDivisionError"):
        load_user_class(a_config("Odd", target="raises_on_import:Reward"))


def test_arguments_that_a_reward_does_not_take_are_refused_before_it_is_made():
    with pytest.raises(ConfigError, match=r"does not take these arguments.*'limits'"):
        load_user_class(a_config("ShareOfLowTokens", arguments={"limits": 10}))


def test_a_reward_that_cannot_be_made_says_why():
    assert load_user_class(a_config("Broken"))
    with pytest.raises(ConfigError, match="cannot be created: OSError: no model here"):
        UserReward(a_config("Broken"))


def test_a_reward_of_sound_is_a_judge():
    config = a_config("Duration", reads="sound")
    assert listens(config)
    assert not listens(a_config("Odd"))
    assert UserJudge(config).judge([a_clip(0)]) == [{"mine": 0.1}]


def test_a_reward_of_tokens_is_a_stage_that_needs_no_sound():
    judged = UserTokenStage(a_config("Fragile"))(token_rows())
    assert judged["mine"].to_pylist() == [1.0, None]
    assert judged["judge_errors"].to_pylist() == ["", "mine: RuntimeError: I cannot read this"]


Answer = Callable[[int, dict[str, Any]], tuple[int, bytes]]


def always(status: int, content: bytes = b"") -> Answer:
    def answer(count: int, body: dict[str, Any]) -> tuple[int, bytes]:
        del count, body
        return status, content

    return answer


@contextmanager
def a_server(
    answer: Answer, headers: Mapping[str, str] = MappingProxyType({}), *, pause_s: float = 0.0
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append({"authorization": self.headers["Authorization"]} | body)
            status, content = answer(len(requests), body)
            try:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                size = 1 if pause_s else max(1, len(content))
                for first in range(0, len(content), size):
                    self.wfile.write(content[first : first + size])
                    time.sleep(pause_s)
            except (BrokenPipeError, ConnectionResetError):  # the client did not wait
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
        (b"[" * 100_000, 'the answer is not {"rewards": [...]}'),
        (b'{"rewards": {"p0/0": 1.0}}', 'the answer is not {"rewards": [...]}'),
        (b'{"rewards": ["high"]}', "'high' is no number"),
        (b'{"rewards": [NaN]}', "nan is no number"),
        (b'{"rewards": [true]}', "True is no number"),
        (b'{"rewards": [' + b"9" * 400 + b"]}", "inf is no number"),
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


def test_an_answer_that_comes_byte_by_byte_must_end_in_time_too():
    with a_server(always(200, rewards(1.0)), pause_s=0.1) as (url, _):
        (found,) = judged(url, 1, timeout_s=0.5, max_retries=0)
        assert found == Unmeasured("remote: ReadTimeout the answer did not end in time")
        assert judged(url, 1, timeout_s=30.0) == [{"remote": 1.0}]


def test_a_server_that_is_not_there_is_missing():
    (found,) = judged("http://127.0.0.1:9", 1, max_retries=1)  # the port of `discard`
    assert isinstance(found, Unmeasured)
    assert found.reason.startswith("remote: ConnectError")


def test_each_retry_waits_twice_as_long_as_the_one_before():
    times_s: list[float] = []

    def busy(*_: object) -> tuple[int, bytes]:
        times_s.append(time.monotonic())
        return 429, b""

    with a_server(busy) as (url, _):
        judged(url, 1, max_retries=2, backoff_s=0.1)
    first_s, second_s = np.diff(times_s)
    assert first_s >= 0.1
    assert second_s >= 0.2


def test_an_answer_that_cannot_be_unpacked_is_not_asked_for_again():
    with a_server(always(200, b"no gzip"), {"Content-Encoding": "gzip"}) as (url, requests):
        (found,) = judged(url, 1)
    assert isinstance(found, Unmeasured)
    assert found.reason.startswith("remote: DecodingError")
    assert len(requests) == 1


def test_a_sample_without_sound_is_sent_too():
    silent = replace(a_clip(0), waveform_N=np.zeros(0, np.float32))
    with a_server(always(200, rewards(0.25))) as (url, requests):
        judge = HttpJudge(HttpJudgeConfig(name="remote", url=url))
        assert judge.judge([silent]) == [{"remote": 0.25}]
    sound = base64.b64decode(requests[0]["samples"][0]["audio_wav_base64"])
    assert sf.info(io.BytesIO(sound)).frames == 0


def test_a_server_that_fails_for_a_tenth_leaves_a_tenth_without_a_reward():
    def all_but_each_tenth(_: int, body: dict[str, Any]) -> tuple[int, bytes]:
        numbers = [int(sample["id"][1:].split("/")[0]) for sample in body["samples"]]
        return 200, rewards(*[None if n % 10 == 0 else 0.5 for n in numbers])

    count = 20
    table = pa.table(
        {
            "prompt_id": [f"p{index}" for index in range(count)],
            "sample_index": [0] * count,
            "text": ["x"] * count,
            "waveform_pcm": [b"\x00\x40" * 800] * count,
            "reference_pcm": [b""] * count,
            "sample_rate_hz": [16000] * count,
            "golden_duration_s": [1.0] * count,
            "judge_errors": [""] * count,
        }
    )
    with a_server(all_but_each_tenth) as (url, _):
        stage = JudgeStage(HttpJudgeConfig(name="remote", url=url, batch_size=3))
        rows = stage(table).to_pylist()
    terms = [{"measure": "remote", "weight": 2.0}]
    config = RewardConfig.model_validate({"terms": terms, "failure_budget": 0.1})
    found = rewards_of(rows, config)
    missing = Unmeasured(f"remote: remote: it was not judged ({SILENT})")
    assert found == [missing if i % 10 == 0 else Measured(1.0) for i in range(count)]
    assert check_budget(found, config) == 2


def test_no_message_has_the_token_in_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_TOKEN", "secr\u00e9t\nX-Other: 1")
    with pytest.raises(ConfigError, match="cannot be sent") as caught:
        judged("http://127.0.0.1:9", 1, token_env="MY_TOKEN")
    assert "secr" not in str(caught.value)
    monkeypatch.setenv("MY_TOKEN", "secret\n")  # as files end
    with a_server(always(200, rewards(1.0))) as (url, requests):
        assert judged(url, 1, token_env="MY_TOKEN") == [{"remote": 1.0}]
    assert requests[0]["authorization"] == "Bearer secret"


def test_the_token_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="MY_TOKEN is not set"):
        judged("http://127.0.0.1:9", 1, token_env="MY_TOKEN")
    monkeypatch.setenv("MY_TOKEN", "secret")
    with a_server(always(200, rewards(1.0))) as (url, requests):
        judged(url, 1, token_env="MY_TOKEN")
    assert requests[0]["authorization"] == "Bearer secret"
