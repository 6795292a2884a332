"""Which iteration is the best, by numbers that a person can check."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from speechalign.artifacts import verify_folder
from speechalign.config.guards import GuardsConfig
from speechalign.evaluation.guards import Violation, judge, violations
from speechalign.evaluation.statistics import Estimate
from speechalign.pipeline.guards import write_best

WORDS = 10.0
UNGUARDED = GuardsConfig(
    max_wer_rise=None,
    max_speaker_similarity_drop=None,
    max_distillmos_drop=None,
    max_stop_rate_drop=None,
    max_duration_error_rise=None,
    max_silence_rise=None,
)


def evaluation(
    errors: Sequence[float | None], **columns: Sequence[float] | Sequence[float | None]
) -> pa.Table:
    count = len(errors)
    values = {
        "prompt_id": [f"p{index}" for index in range(count)],
        "is_truncated": [False] * count,
        "eval_word_errors": pa.array(errors, pa.float64()),
        "eval_words": [WORDS] * count,
    }
    return pa.table(values | {name: pa.array(v, pa.float64()) for name, v in columns.items()})


def wer(percent: float, **columns: Sequence[float] | Sequence[float | None]) -> pa.Table:
    return evaluation([percent / 10] * 4, **columns)


def exactly(value: float) -> Estimate:
    return Estimate(value=value, low=value, high=value)


def test_the_lowest_error_rate_is_the_best():
    verdict = judge([wer(20), wer(10), wer(11), wer(9)], GuardsConfig(), 20)
    assert verdict.best == 3
    assert [c.against for c in verdict.comparisons] == [0, 1, 1]
    assert verdict.lines() == [
        "best: iteration 3, the lowest held-out WER of those that violate no guard, "
        "-1.0 [-1.0, -1.0] points against iteration 1"
    ]


def test_an_equal_error_rate_keeps_the_earlier_one():
    verdict = judge([wer(20), wer(20)], GuardsConfig(), 20)
    assert verdict.best == 0
    assert verdict.lines() == [
        "best: before, no iteration after it has a lower held-out WER and violates no guard"
    ]


def test_an_iteration_beyond_a_limit_is_said_and_is_not_the_best_and_the_run_goes_on():
    silent = wer(10, silence_ratio=[0.4] * 4)
    verdict = judge(
        [wer(20, silence_ratio=[0.2] * 4), silent, wer(15, silence_ratio=[0.2] * 4)],
        GuardsConfig(),
        20,
    )
    assert (verdict.best, verdict.stopped_after) == (2, None)
    assert verdict.lines()[0] == (
        "iteration 1 is worse than before: silence % by +20.0 [+20.0, +20.0], limit 10.0"
    )
    assert verdict.comparisons[1].against == 0


def test_a_guard_ends_the_run_where_it_was_violated():
    guards = GuardsConfig(stop_when_worse=True)
    verdict = judge([wer(20), wer(10), wer(13), wer(1)], guards, 20)
    assert (verdict.best, verdict.stopped_after, len(verdict.comparisons)) == (1, 2, 2)
    assert verdict.lines()[:2] == [
        "iteration 2 is worse than iteration 1: WER % by +3.0 [+3.0, +3.0], limit 2.0",
        "stopped by a guard after iteration 2",
    ]


def test_worse_than_the_best_counts_even_when_better_than_the_start():
    (violation,) = judge([wer(20), wer(10), wer(15)], GuardsConfig(), 20).comparisons[1].violations
    assert violation.worse_by is not None
    assert violation.worse_by.value == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("key", "limit", "better", "within", "beyond"),
    [
        ("wer", "max_wer_rise", -0.3, 0.05, 0.06),
        ("sim", "max_speaker_similarity_drop", 0.3, -0.05, -0.06),
        ("distillmos", "max_distillmos_drop", 0.3, -0.05, -0.06),
        ("stop", "max_stop_rate_drop", 0.3, -0.05, -0.06),
        ("duration_error", "max_duration_error_rise", -0.3, 0.05, 0.06),
        ("silence", "max_silence_rise", -0.3, 0.05, 0.06),
    ],
)
def test_each_guard_knows_its_bad_direction(
    key: str, limit: str, better: float, within: float, beyond: float
):
    guards = UNGUARDED.model_copy(update={limit: 0.05})
    found = [
        violations({key: exactly(value)}, frozenset({key}), guards)
        for value in (better, within, beyond)
    ]
    assert found[:2] == [(), ()]
    assert found[2] == (Violation(metric=key, limit=0.05, worse_by=exactly(0.06)),)
    assert violations({key: exactly(beyond)}, frozenset({key}), UNGUARDED) == ()


def test_the_interval_of_what_got_worse_is_turned_with_its_sign():
    guards = UNGUARDED.model_copy(update={"max_distillmos_drop": 0.1})
    fall = Estimate(value=-0.3, low=-0.5, high=-0.2)
    (violation,) = violations({"distillmos": fall}, frozenset({"distillmos"}), guards)
    assert violation.worse_by == Estimate(value=0.3, low=0.2, high=0.5)


def test_an_interval_with_zero_in_it_counts_only_where_it_was_asked_to():
    unsure = {"wer": Estimate(value=0.5, low=-0.1, high=1.1)}
    assert violations(unsure, frozenset(unsure), GuardsConfig()) == ()
    guards = GuardsConfig(interval_excludes_zero=False)
    assert len(violations(unsure, frozenset(unsure), guards)) == 1


def test_a_metric_that_is_measured_for_nobody_any_more_is_a_violation():
    before, after = wer(20, distillmos=[3.0] * 4), wer(10, distillmos=[None] * 4)
    verdict = judge([before, after], GuardsConfig(), 20)
    assert verdict.best == 0
    assert "DistillMOS is measured for no prompt any more" in verdict.lines()[0]


def test_an_iteration_without_an_error_rate_is_never_better_than_one_with():
    assert judge([wer(20), evaluation([None] * 4)], UNGUARDED, 20).best == 0


def test_durations_off_to_both_sides_do_not_cancel():
    guards = UNGUARDED.model_copy(update={"max_duration_error_rise": 0.1})
    even, uneven = [1.0] * 4, [0.5, 1.5, 0.5, 1.5]
    verdict = judge([wer(20, duration_ratio=even), wer(10, duration_ratio=uneven)], guards, 20)
    (violation,) = verdict.comparisons[0].violations
    assert violation == Violation(metric="duration_error", limit=0.1, worse_by=exactly(0.5))


def test_without_an_error_rate_the_last_good_iteration_is_the_best():
    def clips(ratio: float) -> pa.Table:
        return evaluation([None] * 4, duration_ratio=[ratio] * 4)

    verdict = judge([clips(1.0), clips(1.05), clips(3.0)], GuardsConfig(), 20)
    assert (verdict.best, verdict.reason) == (
        1,
        "the last one that violates no guard; no WER was measured",
    )


def test_the_best_is_an_artifact_that_says_where_the_policy_is(tmp_path: Path):
    verdict = judge([wer(20), wer(10), wer(13)], GuardsConfig(stop_when_worse=True), 20)
    run = tmp_path / "run"
    write_best(verdict, run / "iteration-1" / "policy", run / "best")
    facts = verify_folder(run / "best")
    assert (facts["iteration"], facts["policy"]) == (1, "iteration-1/policy")
    assert facts["stopped_after"] == 2
    (violation,) = facts["comparisons"][1]["violations"]
    assert (violation["metric"], violation["limit"]) == ("wer", 0.02)
    assert facts["reason"] == (
        "the lowest held-out WER of those that violate no guard, "
        "-10.0 [-10.0, -10.0] points against before"
    )
    write_best(judge([wer(20)], GuardsConfig(), 20), tmp_path / "ar", run / "best")
    assert verify_folder(run / "best")["policy"] == "../ar"
