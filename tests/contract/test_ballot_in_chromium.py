"""The page of a ballot in a real browser: choices outlive the page, and are saved as votes."""

import json
import os
import time
from pathlib import Path

import numpy as np

from speechalign.evaluation.pages import sound_url, write_page
from speechalign.pipeline.ballot import TEMPLATE
from speechalign.rows import pcm_from_waveform
from tests.browser import NEEDS_BROWSER, open_browser

pytestmark = NEEDS_BROWSER

SPACE, RIGHT = " ", "\ue014"


def a_ballot(path: Path) -> None:
    sound = sound_url(pcm_from_waveform(np.sin(np.arange(8000) / 10).astype(np.float32)), 16000)
    comparisons = [
        {
            "prompt_id": prompt_id,
            "text": f"the {prompt_id} says <b>",
            "a": {"index": 3, "source": sound},
            "b": {"index": 1, "source": sound},
        }
        for prompt_id in ("dog", "cat", "cow")
    ]
    values = {"title": "Listening: x", "key": "k", "file": "v.jsonl", "comparisons": comparisons}
    write_page(TEMPLATE, values, path)


def test_choices_by_keyboard_are_kept_and_saved_as_votes(tmp_path: Path):
    page = tmp_path / "ballot.html"
    a_ballot(page)
    with open_browser(tmp_path) as browser:
        browser.visit(page.as_uri())
        assert "the dog says &lt;b&gt;" in browser.wait_for("0 of 3 decided")
        browser.focus("[name=dog][value=a]")
        browser.press(SPACE)
        browser.focus("[name=cat][value=a]")
        browser.press(SPACE + RIGHT)  # from A to B
        browser.focus("[name=cow][value=none]")
        browser.press(SPACE)
        browser.wait_for("3 of 3 decided")
        browser.visit(page.as_uri())
        browser.wait_for("3 of 3 decided")
        browser.screenshot(Path(os.environ.get("SPEECHALIGN_SCREENSHOT", tmp_path / "page.png")))
        browser.focus("#save")
        browser.press(SPACE)
        deadline = time.monotonic() + 60
        while not (tmp_path / "v.jsonl").exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert list(map(json.loads, (tmp_path / "v.jsonl").read_text().splitlines())) == [
        {"prompt_id": "dog", "chosen": 3, "rejected": 1},
        {"prompt_id": "cat", "chosen": 1, "rejected": 3},
    ]
