"""A page to vote on: its sounds are the samples, and its votes become pairs."""

import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from speechalign.pipeline.ballot import write_ballot
from speechalign.pipeline.votes import write_votes
from speechalign.sampling.pipeline import SCORED
from speechalign.training.preference import read_pairs
from tests.ray.conftest import FinishedRun

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]

COMPARISON = re.compile(
    r'<fieldset data-prompt="(?P<prompt_id>[^"]+)" data-a="(?P<a>\d+)" data-b="(?P<b>\d+)">.*?'
    r"“(?P<text>[^”]+)”(?P<sounds>.*?)</fieldset>",
    re.DOTALL,
)


def test_the_samples_of_a_run_are_heard_on_the_page_and_its_votes_make_pairs(
    finished: FinishedRun, tmp_path: Path
):
    page = tmp_path / "ballot.html"
    said = write_ballot(finished.config, page, iteration=1, count=5)
    scored = finished.folder / "iteration-1" / "scored"
    assert said.startswith(f"5 comparisons: {page}\n")
    rows = pq.read_table(scored / SCORED).to_pylist()
    samples = {(row["prompt_id"], row["sample_index"]): row for row in rows}
    asked = [found.groupdict() for found in COMPARISON.finditer(page.read_text())]
    assert len(asked) == 5
    for one in asked:
        assert samples[one["prompt_id"], int(one["a"])]["text"] == one["text"]
        first, second = re.findall(r"data:audio/flac;base64,([^\"]+)", one["sounds"])
        assert first != second
    votes = tmp_path / "votes.jsonl"
    votes.write_text(
        "".join(
            json.dumps(
                {"prompt_id": one["prompt_id"], "chosen": int(one["b"]), "rejected": int(one["a"])}
            )
            + "\n"
            for one in asked
        )
    )
    write_votes(votes, scored, tmp_path / "pairs")
    pairs = {pair.prompt_id: pair for pair in read_pairs(tmp_path / "pairs")}
    for one in asked:
        chosen = samples[one["prompt_id"], int(one["b"])]["token_ids"]
        assert list(pairs[one["prompt_id"]].chosen_token_ids) == chosen
