"""The page in a real browser: it lists what there is, speaks, and shows how long it took."""

import base64
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from speechalign.serving.api import build_api
from speechalign.serving.keys import ApiKey, Gate
from speechalign.serving.service import SpeechService
from speechalign.serving.telemetry import Telemetry
from tests.serving_stack import KEY, build_service, serving_config

DRIVER = shutil.which("chromedriver")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--window-size=900,900",
]  # fmt: skip
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""The key of WebDriver's element references."""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DRIVER is None, reason="no chromedriver; .ci/run installs it"),
]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Browser:
    """A person's hands and eyes: the few words of WebDriver that are needed."""

    def __init__(self, http: httpx.Client, session: str) -> None:
        self._http, self._session = http, f"/session/{session}"

    def _do(self, path: str, **values: Any) -> Any:
        return self._http.post(self._session + path, json=values).raise_for_status().json()["value"]

    def visit(self, url: str) -> None:
        self._do("/url", url=url)

    def page(self) -> str:
        return self._http.get(f"{self._session}/source").json()["value"]

    def press(self, keys: str) -> None:
        """Type into whatever has the focus."""
        element = self._http.get(f"{self._session}/element/active").json()["value"][ELEMENT]
        self._do(f"/element/{element}/value", text=keys)

    def focus(self, css: str) -> None:
        self._do("/execute/sync", script=f"document.querySelector('{css}').focus()", args=[])

    def wait_for(self, pattern: str, count: int = 1) -> str:
        """Return the page as soon as a pattern is there so often."""
        deadline = time.monotonic() + 90
        while len(re.findall(pattern, self.page())) < count:
            assert time.monotonic() < deadline, self.page()[-3000:]
            time.sleep(0.2)
        return self.page()

    def screenshot(self, path: Path) -> None:
        image = self._http.get(f"{self._session}/screenshot").json()["value"]
        path.write_bytes(base64.b64decode(image))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert DRIVER is not None
    port = free_port()
    driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as http:
        deadline = time.monotonic() + 60
        while True:
            try:
                http.get("/status")
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline
                time.sleep(0.2)
        wanted = {"alwaysMatch": {"goog:chromeOptions": {"args": FLAGS}}}
        session = http.post("/session", json={"capabilities": wanted}).json()["value"]["sessionId"]
        yield Browser(http, session)
        http.delete(f"/session/{session}")
    driver.terminate()
    driver.wait(20)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> SpeechService:
    both = {name: {"path": "speechalign/assets/ar"} for name in ("base", "aligned")}
    return build_service(serving_config(tmp_path_factory.mktemp("voices"), policies=both))


@contextmanager
def listening(service: SpeechService, *keys: ApiKey) -> Iterator[str]:
    """Serve on a port of this machine, as Serve's replica does behind its proxy."""
    api = build_api(service, Gate(list(keys), service.config.limits), Telemetry())
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(api, port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(20)


def test_a_sentence_is_typed_and_heard_from_both_policies_without_a_mouse(
    service: SpeechService, browser: Browser, tmp_path: Path
):
    with listening(service) as address:
        browser.visit(address)
        browser.wait_for("<option")
        browser.focus("#text")
        browser.press("\ue009a\ue000")  # Control-A, and let go
        browser.press("Good morning.")
        browser.press("\ue009\ue007\ue000")  # Control-Enter
        page = browser.wait_for(r"<dd>\d+ ms for \d+\.\d s of speech</dd>", 2)
        browser.screenshot(Path(os.environ.get("SPEECHALIGN_SCREENSHOT", tmp_path / "page.png")))
    assert re.findall(r"<h2>(\w+)</h2>", page) == ["base", "aligned"]
    assert len(re.findall(r"<dd>\d+ ms</dd>", page)) == 2
    assert page.count('src="blob:') == 2


def test_what_cannot_be_spoken_is_said_on_the_page(service: SpeechService, browser: Browser):
    with listening(service) as address:
        browser.visit(f"{address}/?text=%F0%9F%98%80&speak")
        browser.wait_for(r"cannot speak U\+1F600 \(grinning face\)")


def test_the_page_asks_for_a_key_where_one_is_needed_and_takes_it(
    service: SpeechService, browser: Browser
):
    with listening(service, ApiKey(name="me", key=KEY)) as address:
        browser.visit(address)
        browser.wait_for("Enter an API key")
        browser.focus("#key")
        browser.press(KEY + "\ue004")  # Tab: the field is left
        browser.wait_for("<option")
