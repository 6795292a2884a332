"""What a trainer reads of a block of judged rollouts."""

from functools import partial
from typing import Any

import pyarrow as pa

from speechalign.config.judges import RewardConfig, RewardTermConfig
from speechalign.rewards.combine import rewards_of
from speechalign.training.rollouts import read_block

REWARDS = partial(
    rewards_of, config=RewardConfig(terms=(RewardTermConfig(measure="wer", weight=1),))
)


def a_row(index: int, wer: float | None, errors: str = "") -> dict[str, Any]:
    return {
        "prompt_id": "p",
        "sample_index": index,
        "step": 0,
        "version_step": 0,
        "policy_version": 3,
        "is_heldout": False,
        "prompt_token_ids": [2, 3],
        "token_ids": [8, 1],
        "logprobs": [-1.0, -1.0],
        "is_truncated": False,
        "sampled_from_s": 0.0,
        "sampled_until_s": 1.0,
        "probe_difference": 0.0,
        "judge_errors": errors,
        "wer": wer,
    }


def test_an_answer_that_was_not_rendered_has_no_reward_and_no_measures():
    rows = [a_row(0, 0.25), a_row(1, 1.0, "rendering: out of memory"), a_row(2, None, "too short")]
    block = read_block(pa.Table.from_pylist(rows), REWARDS, 3)
    assert [rollout.reward for rollout in block.learned] == [0.25, None, None]
    assert block.measures["wer"] == [0.25]


def test_what_was_measured_of_held_out_answers_is_kept_apart():
    rows = [a_row(0, 0.25), a_row(1, 0.5), a_row(2, None, "too short"), a_row(3, 0.75)]
    for row in rows[1:]:
        row["is_heldout"] = True
    block = read_block(pa.Table.from_pylist(rows), REWARDS, 3)
    assert block.measures["wer"] == [0.25]
    assert block.heldout_measures["wer"] == [0.5, 0.75]
    assert len(block.heldout) == 3
