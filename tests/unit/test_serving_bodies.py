"""Bodies that differ from what their headers say, as a web server hands them over."""

import asyncio
import http.client
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import uvicorn
from starlette.types import Message

from speechalign.serving.api import build_api
from speechalign.serving.keys import Gate
from speechalign.serving.service import SpeechService
from speechalign.serving.telemetry import Telemetry
from tests.serving_stack import client_of, serving_config

SPEECH = "/v1/audio/speech"
BODY = json.dumps({"model": "base", "voice": "alloy", "input": "Good morning."}).encode()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> SpeechService:
    """An endpoint without a policy: no body of this file gets so far."""
    folder = tmp_path_factory.mktemp("bodies")
    nobody: Any = None
    return SpeechService(
        serving_config(folder, limits={"body_timeout_s": 0.3}), {}, nobody, Telemetry()
    )


@pytest.fixture(scope="module", params=["h11", "httptools"])
def parser(request: pytest.FixtureRequest) -> Literal["h11", "httptools"]:
    return request.param


@pytest.fixture(scope="module")
def port(service: SpeechService, parser: Literal["h11", "httptools"]) -> Iterator[int]:
    api = build_api(service, Gate([], service.config.limits), Telemetry())
    config = uvicorn.Config(api, port=0, http=parser, log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


def sent(port: int, length: str, body: bytes) -> tuple[int, bytes]:
    """Send a body with a Content-Length of one's own; return the first answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as one:
        head = (
            f"POST {SPEECH} HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        )
        one.sendall(head.encode() + body)
        answer = http.client.HTTPResponse(one)
        answer.begin()
        return answer.status, answer.read()


def problem(message: str, code: str) -> dict[str, Any]:
    return {
        "error": {
            "message": message, "type": "invalid_request_error", "param": None, "code": code,
        }
    }  # fmt: skip


def test_a_body_shorter_than_it_said_is_not_waited_for_without_end(port: int):
    status, answer = sent(port, str(len(BODY) + 5), BODY)
    assert status == 408
    assert json.loads(answer) == problem("the body did not arrive within 0.3 s", "body_timeout")


def test_a_length_that_is_no_number_gets_no_further_than_the_web_server(port: int):
    for length in ("12abc", "-1", "1e3", "0x10", "+12"):
        assert sent(port, length, BODY) == (400, b"Invalid HTTP request received.")


def test_of_a_body_longer_than_it_said_the_rest_is_no_part_of_it(port: int, parser: str):
    status, answer = sent(port, str(len(BODY) - 1), BODY)
    assert status == 400
    if parser == "h11":  # the other one looks first at the rest, which is no request
        assert json.loads(answer) == problem("the body is not JSON", "bad_json")
    else:
        assert answer == b"Invalid HTTP request received."


def test_a_client_that_leaves_in_the_middle_of_its_body_harms_nobody(port: int):
    with socket.create_connection(("127.0.0.1", port)) as one:
        head = f"POST {SPEECH} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
        one.sendall(head.encode() + BODY[:10])
    status, answer = sent(port, str(len(BODY) - 1), BODY[:-1])
    assert status == 400
    assert json.loads(answer)["error"]["code"] == "bad_json"


class Tags:
    """A counter that remembers what it counted."""

    def __init__(self) -> None:
        self.told: list[dict[str, str]] = []

    def inc(self, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
        del value
        self.told.append(tags or {})


async def leave(service: SpeechService, telemetry: Telemetry, path: str, way: str) -> list[Message]:
    """Send the start of a body and go away, as a web server or Serve tells of it."""
    api = build_api(service, Gate([], service.config.limits), telemetry)
    kind = "application/json" if path == SPEECH else "multipart/form-data; boundary=x"
    scope = {
        "type": "http", "method": "POST", "path": path, "query_string": b"",
        "headers": [(b"content-type", kind.encode())],
    }  # fmt: skip
    start = b'--x\r\nContent-Disposition: form-data; name="name"\r\n\r\nme'
    messages: list[Message] = [{"type": "http.request", "body": start, "more_body": True}]
    if way == "message":
        messages.append({"type": "http.disconnect"})
    sent: list[Message] = []

    async def receive() -> Message:
        if not messages:
            request.cancel()
            await asyncio.Event().wait()
        return messages.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    request = asyncio.create_task(api(scope, receive, send))
    await asyncio.wait([request])
    assert request.cancelled() == (way == "cancel")
    return sent


@pytest.mark.parametrize("way", ["message", "cancel"])
@pytest.mark.parametrize("path", [SPEECH, "/v1/audio/voices"])
def test_a_client_that_leaves_in_the_middle_of_its_body_is_counted_as_one_and_is_no_error(
    service: SpeechService, caplog: pytest.LogCaptureFixture, path: str, way: str
):
    telemetry: Any = Telemetry()
    telemetry.ends, telemetry.rejects = Tags(), Tags()
    with caplog.at_level(logging.WARNING):
        sent = asyncio.run(leave(service, telemetry, path, way))
    assert telemetry.ends.told == [{"model": "", "end": "cancelled"}]
    assert (telemetry.rejects.told, caplog.records) == ([], [])
    statuses = [one["status"] for one in sent if one["type"] == "http.response.start"]
    assert statuses == ([499] if way == "message" else [])


@pytest.mark.parametrize("length", ["12abc", "-1", "1.5", "0x10"])
def test_a_length_that_another_server_lets_through_is_refused_here(
    service: SpeechService, length: str
):
    headers = {"Content-Type": "application/json", "Content-Length": length}
    with client_of(service) as client:
        answer = client.post(SPEECH, content=BODY, headers=headers)
    assert answer.status_code == 400
    assert answer.json() == problem("Content-Length is not a number", "bad_content_length")
