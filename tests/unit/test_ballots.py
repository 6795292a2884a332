from dataclasses import replace
from pathlib import Path

import pytest

from speechalign.errors import ConfigError
from speechalign.pipeline.ballot import write_ballot
from speechalign.preferences.ballots import choose_comparisons
from speechalign.types import Sample
from tests.builders import a_sample
from tests.tiny_stack import build_tiny_stack, tiny_recipe


def some_samples(prompt_id: str, *token_ids: tuple[int, ...]) -> list[Sample]:
    return [
        replace(a_sample(prompt_id=prompt_id, index=i), token_ids=ids, logprobs=(-0.5,) * len(ids))
        for i, ids in enumerate(token_ids)
    ]


def test_two_samples_of_each_prompt_are_drawn_in_an_order_of_the_seed():
    samples = [s for i in range(40) for s in some_samples(f"p{i}", (8,), (9,), (10,))]
    chosen = choose_comparisons(samples, 40, seed=1)
    assert {c.first.prompt_id for c in chosen} == {f"p{i}" for i in range(40)}
    assert all(c.first.prompt_id == c.second.prompt_id for c in chosen)
    orders = {(c.first.sample_index, c.second.sample_index) for c in chosen}
    assert orders == {(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)}
    assert choose_comparisons(samples, 40, seed=1) == chosen
    assert choose_comparisons(samples, 40, seed=2) != chosen
    assert choose_comparisons(samples, 3, seed=1) == chosen[:3]


def test_nobody_is_asked_about_what_no_vote_can_choose():
    cut = [replace(s, is_truncated=s.sample_index == 1) for s in some_samples("cut", (8,), (9,))]
    empty, twins = some_samples("empty", (8,), ()), some_samples("twins", (8,), (8,))
    good = some_samples("good", (8,), (), (9,))
    (comparison,) = choose_comparisons([*cut, *empty, *twins, *good], 9, seed=0)
    assert {comparison.first.sample_index, comparison.second.sample_index} == {0, 2}


def test_a_page_is_not_overwritten_and_a_run_must_have_samples(tmp_path: Path):
    config = tiny_recipe(build_tiny_stack(tmp_path), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"iteration-2/scored holds no judged samples"):
        write_ballot(config, tmp_path / "ballot.html", iteration=2, count=1)
    (tmp_path / "ballot.html").touch()
    with pytest.raises(ConfigError, match="exists; name another file"):
        write_ballot(config, tmp_path / "ballot.html", iteration=1, count=1)
    with pytest.raises(ConfigError, match="cannot be written"):  # before anything is rendered
        write_ballot(config, tmp_path / "ballot.html" / "x.html", iteration=1, count=1)
