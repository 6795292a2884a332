import numpy as np
import pyarrow as pa
import pytest

from speechalign.evaluation.distribution_gap import (
    NUM_FOLDS,
    Separation,
    TokenClouds,
    auc,
    heldout_scores,
    project,
    prompt_folds,
    separate,
    separation_lines,
)
from speechalign.evaluation.heard_gap import heard_gap, heard_rows
from speechalign.evaluation.statistics import Estimate, share_closed
from speechalign.evaluation.summary import gap_closed


def a_cloud(seed: int, *, num_prompts: int = 100, shift: float = 0.0) -> np.ndarray:
    vectors_PD = np.random.default_rng(seed).normal(size=(num_prompts, 8)).astype(np.float32)
    return vectors_PD + np.float32(shift)


def judged(errors: dict[str, float]) -> pa.Table:
    return pa.table(
        {
            "prompt_id": list(errors),
            "is_truncated": [False] * len(errors),
            "eval_word_errors": pa.array(list(errors.values()), pa.float32()),
            "eval_words": pa.array([4.0] * len(errors), pa.float32()),
        }
    )


def test_an_auc_is_the_share_of_right_orders_and_a_tie_is_half():
    # Of four orders two are right, one is a tie, one is wrong.
    assert auc(np.array([0.0, 2.0]), np.array([2.0, 1.0])) == pytest.approx(2.5 / 4)


def test_clouds_of_one_distribution_cannot_be_told_apart():
    found = separate(a_cloud(0), {"before": a_cloud(1)}, 200)["before"]
    assert found.auc.value == pytest.approx(0.5, abs=0.08)
    assert found.auc.low < 0.5 < found.auc.high


def test_clouds_far_apart_are_always_told_apart_and_the_change_is_to_the_first():
    synthetic = {"before": a_cloud(1, shift=9.0), "iteration 1": a_cloud(2)}
    found = separate(a_cloud(0), synthetic, 200)
    assert found["before"].auc == Estimate(value=1.0, low=1.0, high=1.0)
    assert found["before"].change == Estimate(value=0.0, low=0.0, high=0.0)
    change = found["iteration 1"].change
    assert change.value == pytest.approx(found["iteration 1"].auc.value - 1.0)
    assert change.high < 0


def test_identical_clouds_have_an_auc_of_exactly_a_half():
    same = a_cloud(0, num_prompts=40)
    assert auc(*heldout_scores(same, same)) == 0.5


def test_the_answers_to_one_prompt_do_not_change_how_they_are_scored():
    golden, synthetic = a_cloud(0, num_prompts=20), a_cloud(1, num_prompts=20, shift=0.5)
    fold_P = prompt_folds(20)
    is_held = fold_P == fold_P[3]
    moved_golden, moved_synthetic = golden.copy(), synthetic.copy()
    moved_golden[3] += 50.0
    moved_synthetic[3] -= 50.0
    before = heldout_scores(golden, synthetic)
    after = heldout_scores(moved_golden, moved_synthetic)
    is_held[3] = False  # its own scores move with it
    for old_P, new_P in zip(before, after, strict=True):
        np.testing.assert_array_equal(old_P[is_held], new_P[is_held])
        assert not np.isclose(old_P[fold_P != fold_P[3]], new_P[fold_P != fold_P[3]]).any()


def test_folds_are_of_one_size_and_the_same_every_time():
    fold_P = prompt_folds(12)
    assert sorted(np.bincount(fold_P)) == [2, 2, 2, 3, 3]
    assert len(np.bincount(fold_P)) == NUM_FOLDS
    np.testing.assert_array_equal(fold_P, prompt_folds(12))


def test_all_clouds_are_projected_together():
    near, far = a_cloud(0, num_prompts=12), a_cloud(1, num_prompts=12, shift=40.0)
    planes = project({"golden": near, "before": far, "iteration 1": near + np.float32(1e-4)})
    assert list(planes) == ["golden", "before", "iteration 1"]
    golden, before, after = (np.array(planes[name]) for name in planes)
    apart = np.linalg.norm(golden.mean(0) - before.mean(0))
    assert np.linalg.norm(golden - after, axis=1).max() < apart / 4
    assert project({"golden": near}) == project({"golden": near})


def test_the_numbers_are_said_with_the_change_since_before():
    estimate = Estimate(value=0.75, low=0.5, high=0.875)
    less = Estimate(value=-0.125, low=-0.25, high=0.0)
    nothing = Estimate(value=0.0, low=0.0, high=0.0)
    separations = {
        "before": Separation(auc=estimate, change=nothing),
        "iteration 1": Separation(auc=estimate, change=less),
    }
    assert separation_lines(TokenClouds(separations=separations, points={})) == [
        "AUC golden against synthetic tokens, before: 0.750 [0.500, 0.875]",
        "AUC golden against synthetic tokens, iteration 1: 0.750 [0.500, 0.875], "
        "change -0.125 [-0.250, +0.000]",
    ]
    assert Separation.from_json(separations["iteration 1"].to_json()) == separations["iteration 1"]


def test_a_share_of_the_gap_is_what_alignment_closed_of_the_way_to_golden():
    ones = np.ones(4)
    before, after, golden = (np.full(4, value) for value in (0.5, 0.2, 0.1))
    share = share_closed((before, ones), (after, ones), (golden, ones), 50)
    assert share is not None
    assert (share.value, share.low, share.high) == pytest.approx((0.75, 0.75, 0.75))
    # A measure that grows towards golden has the same share.
    share = share_closed((golden, ones), (after, ones), (before, ones), 50)
    assert share is not None
    assert share.value == pytest.approx(0.25)


def test_a_gap_that_is_not_there_in_every_resample_has_no_share():
    ones = np.ones(3)
    unsure = (np.array([3.0, 0.0, 0.0]), ones)
    golden = (np.array([0.0, 1.0, 1.0]), ones)
    assert share_closed(unsure, golden, golden, 200) is None
    assert share_closed(golden, golden, golden, 200) is None


def test_golden_and_synthetic_are_heard_on_the_prompts_that_all_have():
    golden = judged({"a": 0.0, "b": 0.0})
    before = judged({"a": 2.0, "b": 2.0, "c": 4.0})
    after = judged({"b": 1.0, "a": 1.0, "c": 0.0})
    heard = heard_gap(golden, {"before": before, "iteration 1": after}, 50)
    assert heard is not None
    assert [policy.num_prompts for policy in heard.policies] == [2, 2]
    assert heard.differences["before"]["wer"] == Estimate(value=0.5, low=0.5, high=0.5)
    assert heard.shares == {"iteration 1": {"wer": Estimate(value=0.5, low=0.5, high=0.5)}}
    assert gap_closed(before, after, golden, 50) == heard.shares["iteration 1"]
    assert heard_rows(heard) == [
        ["NAR fed with", "prompts", "WER %", "minus golden", "gap closed %"],
        ["golden tokens", "2", "0.0 [0.0, 0.0]", "", ""],
        ["before", "2", "50.0 [50.0, 50.0]", "+50.0 [+50.0, +50.0]", ""],
        ["iteration 1", "2", "25.0 [25.0, 25.0]", "+25.0 [+25.0, +25.0]", "50 [50, 50]"],
    ]
    assert heard.to_json()["shares"]["iteration 1"]["wer"]["value"] == 0.5


def test_a_gap_that_cannot_be_measured_is_said_to_be_unclear():
    same = judged({"a": 1.0})
    heard = heard_gap(same, {"before": same, "iteration 1": same}, 20)
    assert heard is not None
    assert heard_rows(heard)[3][-1] == "no clear gap"


def test_recordings_of_other_prompts_measure_no_gap():
    assert heard_gap(judged({"a": 0.0}), {"before": judged({"b": 0.0})}, 20) is None
