"""Systems side by side: win rates and the table, by hand."""

import pyarrow as pa
import pytest

from speechalign.evaluation.comparison import (
    System,
    compare_systems,
    comparison_rows,
    win_rates,
)


def judged(wers: list[float | None], sims: list[float]) -> pa.Table:
    return pa.table(
        {
            "prompt_id": [f"p{index}" for index in range(len(wers))],
            "is_truncated": [False] * len(wers),
            "eval_wer": pa.array(wers, pa.float32()),
            "eval_word_errors": pa.array(wers, pa.float32()),
            "eval_words": [1.0] * len(wers),
            "speaker_similarity": sims,
        }
    )


BEFORE = System(label="SFT", judged=judged([0.5, 0.5, 0.5, 0.5], [0.8] * 4), facts={})


def test_a_win_counts_one_and_a_tie_half():
    after = judged([0.25, 0.5, 0.75, 0.0], [0.9, 0.9, 0.9, 0.7])
    rates = win_rates(BEFORE, System(label="x", judged=after, facts={}), 50)
    assert rates["eval_wer"].value == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert rates["speaker_similarity"].value == pytest.approx(3 / 4)
    assert "distillmos" not in rates


def test_a_prompt_without_a_judgement_has_no_vote():
    after = judged([None, 0.25, float("nan"), 0.25], [0.8] * 4)
    rates = win_rates(BEFORE, System(label="x", judged=after, facts={}), 50)
    assert rates["eval_wer"].value == 1.0
    assert rates["speaker_similarity"].value == 0.5


def test_the_table_has_a_row_a_system_and_the_first_is_compared_with_nothing():
    after = System(label="DPO", judged=judged([0.25] * 4, [0.8] * 4), seconds=90.0, facts={})
    head, first, second = comparison_rows(compare_systems(BEFORE, [after], 50))
    assert head[0] == "system"
    assert head[-4:] == ["WER against the first", "wins % by WER", "wins % by SIM", "min"]
    assert first[0] == "SFT"
    assert first[-4:] == ["", "", "", ""]
    assert second[0] == "DPO"
    assert second[-4:] == [
        "-50 [-50, -50]", "100 [100, 100]", "50 [50, 50]", "2",
    ]  # fmt: skip


def test_the_share_of_the_gap_to_the_ceiling_is_beside_every_system_but_the_two_ends():
    after = System(label="DPO", judged=judged([0.25] * 4, [0.8] * 4), facts={})
    golden = System(label="golden", judged=judged([0.125] * 4, [0.8] * 4), facts={})
    compared = compare_systems(BEFORE, [after], 50, ceiling=golden)
    assert [one.summary.name for one in compared] == ["SFT", "DPO", "golden"]
    assert compared[1].closed["wer"].value == pytest.approx(2 / 3)
    head, *rows = comparison_rows(compared)
    place = head.index("gap closed %")
    assert [row[place] for row in rows] == ["", "67 [67, 67]", ""]
    assert [one.wins for one in (compared[0], compared[2])] == [{}, {}]
    assert "gap closed %" not in comparison_rows(compare_systems(BEFORE, [after], 50))[0]
