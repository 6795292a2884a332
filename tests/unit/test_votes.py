import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from speechalign.artifacts import committed_folder
from speechalign.cli import app
from speechalign.config.preferences import PairingConfig
from speechalign.errors import ConfigError, DataError
from speechalign.pipeline.votes import write_votes
from speechalign.preferences.votes import ListenerVote, pairs_of_votes
from speechalign.rows import samples_to_table
from speechalign.sampling.pipeline import QUARANTINED, SCORED
from speechalign.training.stored_pairs import read_pairs
from speechalign.types import PairKind, Sample
from tests.builders import a_prompt, a_sample


def samples(*token_ids: tuple[int, ...], cut: int | None = None) -> dict[tuple[str, int], Sample]:
    made = [
        replace(
            a_sample(index=i), token_ids=ids, logprobs=(-0.5,) * len(ids), is_truncated=i == cut
        )
        for i, ids in enumerate(token_ids)
    ]
    return {("p0", sample.sample_index): sample for sample in made}


def votes(*choices: tuple[int, int]) -> list[ListenerVote]:
    return [
        ListenerVote(row_id=f"f:{number}", prompt_id="p0", chosen=chosen, rejected=rejected)
        for number, (chosen, rejected) in enumerate(choices, 1)
    ]


THREE = samples((8, 1), (9, 1), (10, 1))


def test_most_listeners_decide_and_the_margin_says_how_many_more():
    voted = pairs_of_votes(votes((1, 0), (0, 1), (1, 0), (1, 0)), THREE)
    (pair,) = voted.pairs
    assert (pair.kind, pair.pair_id) == (PairKind.VOTED, "p0/v0/voted/0-1")
    assert (pair.chosen_token_ids, pair.rejected_token_ids) == ((9, 1), (8, 1))
    assert pair.margin == pytest.approx((3 - 1) / 4)


def test_a_tie_teaches_nothing_and_is_counted():
    voted = pairs_of_votes(votes((1, 0), (0, 1), (2, 0)), THREE)
    assert [pair.chosen_token_ids for pair in voted.pairs] == [(10, 1)]
    assert voted.num_ties == 1


def test_what_cannot_be_compared_goes_to_quarantine_with_its_reason():
    heard = samples((8, 1), (8, 1), (), (9,), cut=3)
    voted = pairs_of_votes(votes((0, 7), (0, 1), (0, 2), (3, 0), (3, 0), (0, 3)), heard)
    assert dict(voted.quarantine) == {
        "f:1": "there is no sample p0/7",
        "f:2": "both samples are the same tokens",
        "f:3": "one of the samples is empty",
        "p0/0-3": "sample p0/3 won, but is truncated, and never chosen",
    }
    assert voted.pairs == ()  # a minority decides nothing
    (pair,) = pairs_of_votes(votes((0, 3)), heard).pairs
    assert pair.rejected_token_ids == (9,)  # a truncated one may be rejected


def a_scored_folder(folder: Path) -> Path:
    table = samples_to_table(THREE.values(), {"p0": a_prompt()})
    with committed_folder(folder / "scored", {"kind": "scored"}) as partial:
        pq.write_table(table, partial / SCORED)
    return folder / "scored"


@pytest.mark.parametrize("name", ["votes.jsonl", "votes.csv"])
def test_a_file_of_votes_becomes_pairs_that_a_training_reads(tmp_path: Path, name: str):
    lines = [("p0", 2, 0), ("p0", 1, 5), ("p0", "x", 0)]
    keys = ("prompt_id", "chosen", "rejected")
    text = "".join(json.dumps(dict(zip(keys, line, strict=True))) + "\n" for line in lines)
    if name.endswith("csv"):
        text = "\n".join(",".join(map(str, line)) for line in [keys, *lines])
    (tmp_path / name).write_text(text)
    arguments = [tmp_path / name, a_scored_folder(tmp_path), tmp_path / "out"]
    result = CliRunner().invoke(app, ["votes", *map(str, arguments)])
    assert result.output == f"3 votes: 1 pairs, 0 ties, 2 in quarantine: {tmp_path / 'out'}\n"
    (pair,) = read_pairs(tmp_path / "out")
    assert (pair.chosen_token_ids, pair.rejected_token_ids) == ((10, 1), (8, 1))
    bad = pq.read_table(tmp_path / "out" / QUARANTINED).to_pylist()
    assert [(row["row_id"], row["reason"]) for row in bad] == [
        (f"{name}:3", "'x', " + ("'0'" if name.endswith("csv") else "0") + " are no two indices"),
        (f"{name}:2", "there is no sample p0/5"),
    ]


@pytest.mark.parametrize("index", ["1.5", "Infinity", "null", "[1]", '"x"'])
def test_what_is_no_index_makes_no_vote(tmp_path: Path, index: str):
    file = tmp_path / "votes.jsonl"
    file.write_text(f'{{"prompt_id": "p0", "chosen": {index}, "rejected": 0}}\n')
    with pytest.raises(DataError, match="are no two indices"):
        write_votes(file, a_scored_folder(tmp_path), tmp_path / "out")


def test_mistakes_are_told_before_anything_is_written(tmp_path: Path):
    scored = a_scored_folder(tmp_path)
    with pytest.raises(ConfigError, match="there is no file of votes"):
        write_votes(tmp_path / "none.csv", scored, tmp_path / "out")
    file = tmp_path / "votes.csv"
    file.write_text("prompt_id,chosen\np0,1\n")
    with pytest.raises(DataError, match="has no column rejected"):
        write_votes(file, scored, tmp_path / "out")
    file.write_text("prompt_id,chosen,rejected\np0,1,0\np0,0,1\n")
    with pytest.raises(DataError, match="makes no pair: 1 ties"):
        write_votes(file, scored, tmp_path / "out")
    with pytest.raises(ConfigError, match="holds no judged samples"):
        write_votes(file, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="exists; name another"):
        write_votes(file, scored, scored)


def test_a_recipe_cannot_ask_for_votes_that_nobody_gave():
    with pytest.raises(ValueError, match="kinds"):
        PairingConfig.model_validate({"kinds": ["voted"]})
