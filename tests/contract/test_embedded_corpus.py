"""What the repository carries as golden tokens keeps its splits apart."""

from pathlib import Path

import pyarrow.parquet as pq

import speechalign
from speechalign.judges.words import normalise
from speechalign.rows import GOLDEN

ASSETS = Path(next(iter(speechalign.__path__))) / "assets"
ROWS = pq.read_table(ASSETS / "golden.parquet").drop_columns(["codes"]).to_pylist()


def of(split: str, key: str) -> set[str]:
    return {row[key] for row in ROWS if row["split"] == split}


def test_the_golden_tokens_have_the_columns_that_prepare_writes():
    assert pq.read_schema(ASSETS / "golden.parquet").names == GOLDEN.names


def test_no_held_out_text_is_spoken_in_training():
    train = {normalise(text) for text in of("train", "text")}
    assert not {text for text in of("heldout", "text") if normalise(text) in train}


def test_only_the_human_voice_of_the_corpus_is_in_both_splits():
    assert of("train", "speaker_id") & of("heldout", "speaker_id") == {"allison"}


def test_every_clip_has_an_id_of_its_own():
    assert len({row["clip_id"] for row in ROWS}) == len(ROWS)
