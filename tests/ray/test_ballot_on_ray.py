"""A page to vote on: its sounds are the samples, and its votes become pairs."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile as sf

from speechalign.artifacts import committed_folder
from speechalign.pipeline.ballot import write_ballot
from speechalign.pipeline.votes import write_votes
from speechalign.policy.ar import VOCABULARY
from speechalign.policy.vocabulary import EOS_ID, Vocabulary
from speechalign.sampling.pipeline import SCORED
from speechalign.training.stored_pairs import read_pairs
from tests.ray.conftest import FinishedRun
from tests.tiny_stack import TinyStack, tiny_recipe

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]

FRAMES_PER_SECOND = 50
COMPARISON = re.compile(
    r'<fieldset data-prompt="(?P<prompt_id>[^"]+)" data-a="(?P<a>\d+)" data-b="(?P<b>\d+)">.*?'
    r"“(?P<text>[^”]+)”(?P<sounds>.*?)</fieldset>",
    re.DOTALL,
)


def with_speech(stack: TinyStack, finished: FinishedRun, folder: Path) -> Path:
    """Let the samples be whole frames and end: a policy of random weights seldom says such."""
    table = pq.read_table(finished.folder / "iteration-1" / "scored" / SCORED)
    layout = Vocabulary.load(stack.ar / VOCABULARY).layout
    rng = np.random.default_rng(0)
    answers = [  # all of another length, so that each can be told by its sound
        [*layout.flatten(rng.integers(0, 16, (1, 8 + row))), EOS_ID] for row in range(len(table))
    ]
    columns = {
        "token_ids": answers,
        "logprobs": [[-0.5] * len(answer) for answer in answers],
        "is_truncated": [False] * len(table),
    }
    for name, values in columns.items():
        field = table.schema.field(name)
        column = pa.array(values, field.type)
        table = table.set_column(table.column_names.index(name), field, column)
    with committed_folder(folder, {"kind": "scored"}) as partial:
        pq.write_table(table, partial / SCORED)
    return folder


def test_the_samples_of_a_run_are_heard_on_the_page_and_its_votes_make_pairs(
    stack: TinyStack, finished: FinishedRun, tmp_path: Path
):
    page = tmp_path / "ballot.html"
    config = tiny_recipe(stack, tmp_path / "run")
    scored = with_speech(stack, finished, config.run_dir / "iteration-1" / "scored")
    said = write_ballot(config, page, iteration=1, count=5)
    assert said.startswith(f"5 comparisons: {page}\n")
    rows = pq.read_table(scored / SCORED).to_pylist()
    samples = {(row["prompt_id"], row["sample_index"]): row for row in rows}
    asked = [found.groupdict() for found in COMPARISON.finditer(page.read_text())]
    assert len(asked) == 5
    for one in asked:
        sounds = re.findall(r"data:audio/flac;base64,([^\"]+)", one["sounds"])
        for side, sound in zip("ab", sounds, strict=True):
            sample = samples[one["prompt_id"], int(one[side])]
            assert sample["text"] == one["text"]
            waveform_N, rate_hz = sf.read(io.BytesIO(base64.b64decode(sound)))
            assert len(waveform_N) / rate_hz == (len(sample["token_ids"]) - 1) / FRAMES_PER_SECOND
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
