from collections.abc import Sequence

import pyarrow as pa
import pytest

from speechalign.config.judges import RewardConfig, RewardTermConfig, SignalConfig
from speechalign.errors import BudgetExceeded
from speechalign.judges.base import SILENT, Judgement
from speechalign.rewards.combine import best_of_groups, check_budget, rewards_of
from speechalign.rewards.stage import JudgeStage
from speechalign.rows import Row
from speechalign.types import Clip, Measured, Unmeasured

CONFIG = RewardConfig(
    terms=(
        RewardTermConfig(measure="wer", weight=-1.0, highest=1.0),
        RewardTermConfig(measure="sim", weight=0.5),
    ),
    failure_budget=0.25,
)


def a_row(prompt_id: str = "a", *, is_truncated: bool = False, **measures: float | None) -> Row:
    return {"prompt_id": prompt_id, "is_truncated": is_truncated, **measures}


def test_the_reward_is_the_weighted_sum_of_its_terms():
    assert rewards_of([a_row(wer=0.25, sim=1.0)], CONFIG) == [Measured(0.25)]


def test_a_word_error_rate_above_one_counts_as_one():
    assert rewards_of([a_row(wer=7.0, sim=0.0)], CONFIG) == [Measured(-1.0)]


def test_without_one_of_its_terms_there_is_no_reward():
    row = a_row(wer=0.0, sim=None) | {"judge_errors": "too short"}
    assert rewards_of([row], CONFIG) == [Unmeasured("sim: too short")]


def test_an_answer_that_says_nothing_may_have_a_worth_and_a_failed_judge_has_none():
    term = RewardTermConfig(measure="sim", weight=2.0, when_silent=-1.0)
    config = RewardConfig(terms=(term,))
    silent = a_row(sim=None) | {"judge_errors": f"speaker: the clip is silent ({SILENT})"}
    failed = a_row(sim=None) | {"judge_errors": "speaker: out of memory"}
    heard = a_row(sim=0.5) | {"judge_errors": f"distillmos: too short ({SILENT})"}
    expected = [Measured(-2.0), Unmeasured("sim: speaker: out of memory"), Measured(1.0)]
    assert rewards_of([silent, failed, heard], config) == expected
    assert rewards_of([silent], CONFIG.model_copy(update={"terms": CONFIG.terms[1:]})) == [
        Unmeasured(f"sim: speaker: the clip is silent ({SILENT})")
    ]


def test_what_judges_say_of_a_row_that_was_not_rendered_is_no_reward():
    row = a_row(wer=1.0, sim=0.0) | {"judge_errors": "rendering: out of memory"}
    assert rewards_of([row], CONFIG) == [Unmeasured("wer: rendering: out of memory")]


def test_what_is_no_number_is_missing():
    assert rewards_of([a_row(wer=float("nan"), sim=0.0)], CONFIG) == [
        Unmeasured("wer: nan is no number")
    ]


def one_term(**term: object) -> RewardConfig:
    return RewardConfig.model_validate({"terms": [{"weight": -1.0} | term]})


def test_a_term_can_be_the_distance_to_a_target():
    config = one_term(measure="duration_ratio", target=1.0, lowest=0.1, highest=0.5)
    rows = [a_row(duration_ratio=ratio) for ratio in (0.75, 1.25, 1.0, 9.0)]
    assert rewards_of(rows, config) == [
        Measured(-0.25), Measured(-0.25), Measured(-0.1), Measured(-0.5)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ({"lowest": 1.0, "highest": 1.0}, "every value of wer would count the same"),
        ({"weight": float("nan")}, "finite number"),
        ({"target": float("inf")}, "finite number"),
    ],
)
def test_a_term_that_makes_no_reward_is_refused(term: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        one_term(**{"measure": "wer", **term})


def test_truncation_can_be_punished_without_a_judge():
    config = one_term(measure="truncated")
    rows = [a_row(is_truncated=True), a_row()]
    assert rewards_of(rows, config) == [Measured(-1.0), Measured(0.0)]


def test_terms_are_normalised_within_the_group_over_what_was_measured():
    config = CONFIG.model_copy(update={"normalise": "group"})
    rows = [
        a_row("a", wer=0.0, sim=0.5),
        a_row("b", wer=0.5, sim=3.0),
        a_row("a", wer=0.5, sim=0.5),
        a_row("a", wer=None, sim=0.5),
        a_row("b", wer=0.5, sim=1.0),
    ]
    found = rewards_of(rows, config)
    assert [s.value if isinstance(s, Measured) else None for s in found] == [
        pytest.approx(1.0),  # wer is one deviation below its mean, sim is the same for all of a
        pytest.approx(0.5),  # sim is one above, half weight
        pytest.approx(-1.0),
        None,
        pytest.approx(-0.5),
    ]


def test_missing_rewards_are_counted_up_to_the_budget_and_stop_the_run_above_it():
    rewards = [Measured(0.0), Measured(0.0), Measured(0.0), Unmeasured("asr died")]
    assert check_budget(rewards, CONFIG) == 1
    message = "2 of 4 samples have no reward; reward.failure_budget allows 25 %; first reason: asr"
    with pytest.raises(BudgetExceeded, match=message):
        check_budget([*rewards[:2], rewards[3], rewards[3]], CONFIG)


def test_the_best_of_a_group_is_its_highest_reward_and_the_first_of_equals():
    table = pa.table(
        {
            "prompt_id": ["a", "b", "a", "b", "a", "c"],
            "sample_index": [0, 0, 1, 1, 2, 0],
            "judge_errors": ["", "", "", "", "", "asr died"],
            "wer": [0.5, 0.1, 0.2, 0.1, None, None],
            "sim": [0.0, 0.0, 0.0, 0.0, 9.0, None],
        }
    )
    config = CONFIG.model_copy(update={"failure_budget": 0.5})
    best = best_of_groups(table, config)
    assert best.select(["prompt_id", "sample_index"]).to_pylist() == [
        {"prompt_id": "a", "sample_index": 1},
        {"prompt_id": "b", "sample_index": 0},
        {"prompt_id": "c", "sample_index": 0},
    ]
    with pytest.raises(BudgetExceeded, match="2 of 6 samples have no reward"):
        best_of_groups(table, CONFIG)


class EveryOtherClip:
    """A judge that fails for every second clip."""

    name = "fake"
    measures = ("loudness",)
    remarks = ("opinion",)

    def judge(self, clips: Sequence[Clip]) -> list[Judgement]:
        return [
            {"loudness": float(abs(clip.waveform_N).max()), "opinion": "loud"}
            if index % 2 == 0
            else Unmeasured("odd")
            for index, clip in enumerate(clips)
        ]


def a_batch(pcm: bytes = b"\xff\x7f" * 2000) -> pa.Table:
    return pa.table(
        {
            "prompt_id": ["a", "b"],
            "sample_index": pa.array([0, 0], pa.int32()),
            "text": ["x", "x"],
            "waveform_pcm": [pcm, pcm],
            "reference_pcm": [pcm, pcm],
            "sample_rate_hz": pa.array([16000, 16000], pa.int32()),
            "golden_duration_s": pa.array([1.0, 1.0], pa.float32()),
            "judge_errors": ["", "earlier: bad"],
        }
    )


def test_a_failed_judgement_is_a_null_beside_its_reason():
    judged = JudgeStage(SignalConfig(), EveryOtherClip())(a_batch())
    assert judged["loudness"].to_pylist() == [1.0, None]
    assert judged["opinion"].to_pylist() == ["loud", None]
    assert judged["judge_errors"].to_pylist() == ["", "earlier: bad; odd"]
    silent = JudgeStage(SignalConfig(), EveryOtherClip())(a_batch(b"\0" * 4000))
    assert silent["judge_errors"].to_pylist() == ["", f"earlier: bad; odd ({SILENT})"]
    assert judged["fake_seconds"].null_count == 0
