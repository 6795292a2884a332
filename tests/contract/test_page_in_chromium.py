"""The page in a real browser: it lists what there is, speaks, and shows how long it took."""

import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn

from speechalign.serving.api import build_api
from speechalign.serving.keys import ApiKey, Gate
from speechalign.serving.service import SpeechService
from speechalign.serving.telemetry import Telemetry
from tests.browser import NEEDS_BROWSER, Browser, free_port, open_browser
from tests.serving_stack import KEY, build_service, serving_config

pytestmark = NEEDS_BROWSER


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("downloads")) as browser:
        yield browser


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
