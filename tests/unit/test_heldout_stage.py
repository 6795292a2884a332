"""Judges that hear held-out answers only: what they leave alone, and what is missing."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from speechalign.config.judges import RewardConfig, RewardTermConfig, SignalConfig
from speechalign.judges.base import SILENT, Judgement
from speechalign.pipeline.sample import SOUND
from speechalign.rewards.combine import rewards_of
from speechalign.rewards.stage import JudgeStage, with_errors
from speechalign.rows import RENDERED, pcm_from_waveform
from speechalign.sampling.heldout import HeldoutStage
from speechalign.training.rollouts import read_block
from speechalign.types import Clip, Measured, Unmeasured

OOM = "rendering: out of memory"
LOUDNESS = [pa.field("loudness", pa.float32()), pa.field("fake_seconds", pa.float32())]
SILENT_IS_BAD = RewardConfig(
    terms=(RewardTermConfig(measure="mine", weight=1.0, when_silent=-9.0),)
)


def a_block(*flags: bool, **columns: Any) -> pa.Table:
    """Return answers of step 0 to prompts p0, p1, ..."""
    indices = range(len(flags))
    values: dict[str, Any] = {
        "prompt_id": [f"p{index}" for index in indices],
        "sample_index": pa.array([0] * len(flags), pa.int32()),
        "is_heldout": list(flags),
        "step": [0] * len(flags),
        "version_step": [0] * len(flags),
        "policy_version": [0] * len(flags),
        "prompt_token_ids": [[2, 3]] * len(flags),
        "token_ids": [[8, 1]] * len(flags),
        "logprobs": [[-1.0, -1.0]] * len(flags),
        "is_truncated": [False] * len(flags),
        "sampled_from_s": [0.0] * len(flags),
        "sampled_until_s": [1.0] * len(flags),
        "probe_difference": [0.0] * len(flags),
        "text": ["x"] * len(flags),
    }
    return pa.table(values | columns)


def with_sound(block: pa.Table, errors: Sequence[str] = ()) -> pa.Table:
    """Render p0 with a loudness of .1, p1 of .2, ...; what has a reason has no sound."""
    reasons = list(errors) or [""] * block.num_rows
    ids: list[Any] = block["prompt_id"].to_pylist()
    waves = [
        np.full(0 if reason.startswith("rendering") else 2000, (int(id_[1:]) + 1) / 10, np.float32)
        for id_, reason in zip(ids, reasons, strict=True)
    ]
    values: dict[str, list[Any]] = {
        "sample_rate_hz": [16000] * block.num_rows,
        "golden_duration_s": [1.0] * block.num_rows,
        "waveform_pcm": [pcm_from_waveform(wave) for wave in waves],
        "reference_pcm": [b""] * block.num_rows,
        "judge_errors": reasons,
    }
    for name, cells in values.items():
        field = RENDERED.field(name)
        block = block.append_column(field, pa.array(cells, field.type))
    return block


class Loudness:
    """Hears how loud a clip is, and remembers whom it heard; cannot judge some."""

    name = "fake"
    measures = ("loudness",)
    remarks = ("opinion",)

    def __init__(self, *fails: str) -> None:
        self.heard: list[str] = []
        self._fails = fails

    def judge(self, clips: Sequence[Clip]) -> list[Judgement]:
        assert clips  # a user's own code may not like none at all
        self.heard += [clip.sample_id for clip in clips]
        return [
            Unmeasured("deaf")
            if clip.sample_id in self._fails
            else {"loudness": float(abs(clip.waveform_N).max()), "opinion": "loud"}
            for clip in clips
        ]


def a_stage(judge: Loudness) -> HeldoutStage:
    return HeldoutStage(JudgeStage, {"config": SignalConfig(), "judge": judge}, LOUDNESS)


def test_only_held_out_answers_are_heard_and_everything_else_stays_as_it_was():
    judge = Loudness()
    block = with_sound(a_block(False, True, True, False, True))
    heard = a_stage(judge)(block)
    assert judge.heard == ["p1/0", "p2/0", "p4/0"]
    assert heard.select(block.column_names) == block
    loudness = heard["loudness"].to_pylist()
    assert [loudness[0], loudness[3]] == [None, None]
    assert [loudness[1], loudness[2], loudness[4]] == pytest.approx([0.2, 0.3, 0.5], abs=1e-4)
    assert heard["fake_seconds"].is_null().to_pylist() == [True, False, False, True, False]
    assert heard["heldout_errors"].to_pylist() == [""] * 5
    assert set(heard.column_names) - set(block.column_names) == {
        "loudness", "fake_seconds", "heldout_errors",
    }  # fmt: skip


def test_a_block_without_held_out_answers_has_the_same_columns_and_asks_nobody():
    judge = Loudness()
    stage = a_stage(judge)
    deals = ((True, False), (False, False), (True, True))
    some, none, all_ = (stage(with_sound(a_block(*flags))) for flags in deals)
    assert some.schema == none.schema == all_.schema
    assert judge.heard == ["p0/0", "p0/0", "p1/0"]
    assert none["loudness"].to_pylist() == [None, None]
    assert all_["loudness"].null_count == 0


def test_a_judge_that_fails_changes_no_reward_and_says_why():
    block = with_sound(a_block(False, True, True, True), ["", "", "", "mine: late"])
    block = block.append_column("mine", pa.array([1.0, 2.0, 3.0, None], pa.float32()))
    muted = block.set_column(
        block.schema.get_field_index("waveform_pcm"),
        RENDERED.field("waveform_pcm"),
        pa.array([b"\0" * 4000] * 4, pa.binary()),
    )
    heard = a_stage(Loudness("p3/0", "p2/0"))(muted)
    assert heard["loudness"].to_pylist() == [None, 0.0, None, None]
    reason = f"deaf ({SILENT})"
    assert heard["heldout_errors"].to_pylist() == ["", "", reason, reason]
    rewards = rewards_of(heard.to_pylist(), SILENT_IS_BAD)
    assert rewards[:3] == [Measured(1.0), Measured(2.0), Measured(3.0)]
    assert rewards[3] == Unmeasured("mine: mine: late")  # not silent: only another judge says so


def test_reasons_of_several_judges_are_joined():
    block = with_sound(a_block(True, True, False))
    once = a_stage(Loudness("p0/0"))(block).drop_columns(["loudness", "fake_seconds"])
    twice = a_stage(Loudness("p0/0", "p1/0"))(once)
    assert twice["heldout_errors"].to_pylist() == ["deaf; deaf", "deaf", ""]


def test_an_answer_that_could_not_be_rendered_is_not_played_to_anybody():
    judge = Loudness()
    heard = a_stage(judge)(with_sound(a_block(True, True), [OOM, ""]))
    assert judge.heard == ["p1/0"]
    assert heard["loudness"].is_null().to_pylist() == [True, False]


class FlakyRenderer:
    """Cannot render the answer p1."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        assert "judge_errors" not in batch.column_names  # it would be there twice
        failed = [OOM if id_ == "p1" else "" for id_ in batch["prompt_id"].to_pylist()]
        batch = with_sound(batch, failed)
        return batch.append_column(SOUND[-1], pa.array([0.5] * batch.num_rows, pa.float32()))


def test_where_only_they_listen_no_other_answer_is_rendered_and_no_reward_needs_it():
    block = a_block(False, True, True, mine=pa.array([1.0, 2.0, 3.0], pa.float32()))
    rendered = HeldoutStage(FlakyRenderer, {}, SOUND)(with_errors(block, ["", "", ""]))
    sounds: list[Any] = rendered["waveform_pcm"].to_pylist()
    assert [len(pcm) for pcm in sounds] == [0, 0, 4000]
    assert rendered["sample_rate_hz"].to_pylist() == [0, 16000, 16000]
    assert rendered["render_seconds"].to_pylist() == [0.0, 0.5, 0.5]
    judge = Loudness()
    table = a_stage(judge)(rendered)
    assert judge.heard == ["p2/0"]
    assert table["heldout_errors"].to_pylist() == ["", OOM, ""]
    read = read_block(table, partial(rewards_of, config=SILENT_IS_BAD), 0)
    assert [r.reward for r in (*read.learned, *read.heldout)] == [1.0, 2.0, 3.0]
    assert (read.measures["mine"], read.measures["loudness"]) == ([1.0], [])
    assert "golden_duration_s" not in read.measures
    assert read.heldout_measures["mine"] == [2.0, 3.0]
    assert read.heldout_measures["loudness"] == pytest.approx([0.3], abs=1e-4)


def test_a_judge_that_fails_for_all_is_told(caplog: pytest.LogCaptureFixture):
    block = with_sound(a_block(True, True, False))
    a_stage(Loudness("p0/0"))(block)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        a_stage(Loudness("p0/0", "p1/0"))(block)
    assert [record.getMessage() for record in caplog.records] == [
        "not one of 2 held-out answers was judged: deaf"
    ]
