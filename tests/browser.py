"""A real browser for the tests of pages, driven through chromedriver."""

import base64
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

DRIVER = shutil.which("chromedriver")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--window-size=900,900",
]  # fmt: skip
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""The key of WebDriver's element references."""
NEEDS_BROWSER = [
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


@contextmanager
def open_browser(downloads: Path) -> Iterator[Browser]:
    """Open a browser that saves what pages offer to a folder."""
    assert DRIVER is not None
    port = free_port()
    driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL)
    options = {"args": FLAGS, "prefs": {"download.default_directory": str(downloads)}}
    wanted = {"alwaysMatch": {"goog:chromeOptions": options}}
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as http:
            wait_for_driver(http)
            answer = http.post("/session", json={"capabilities": wanted}).json()
            session = answer["value"]["sessionId"]
            try:
                yield Browser(http, session)
            finally:
                http.delete(f"/session/{session}")
    finally:
        driver.terminate()
        driver.wait(20)


def wait_for_driver(http: httpx.Client) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            http.get("/status")
        except httpx.TransportError:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        else:
            return
