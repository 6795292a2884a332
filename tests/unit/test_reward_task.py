"""A finished reward model can be reported: what its report is made of is there before it is."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from speechalign.artifacts import committed_folder
from speechalign.config.training import RewardModelConfig
from speechalign.rows import pairs_to_table
from speechalign.training import reward_model
from speechalign.training.reward_model import MARGINS, REPORT, RewardTask
from speechalign.training.stored_pairs import PAIRS
from tests.builders import some_pairs
from tests.online_toy import a_policy_folder


def test_the_margins_are_written_before_the_model_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with committed_folder(tmp_path / "pairs", {}) as partial:
        pq.write_table(pairs_to_table(some_pairs(20)), partial / PAIRS)
    config = RewardModelConfig(
        policy=a_policy_folder(tmp_path / "ar"),
        pairs=(tmp_path / "pairs",),
        output=tmp_path / "rm",
        num_steps=1,
        rows_per_step=2,
        heldout_share=0.5,
    )
    work = tmp_path / "rm-work"
    work.mkdir()
    (work / REPORT).touch()  # of a model that was here before
    seen: list[int] = []

    def commit(_: Path, model: Any, vocabulary: Any, facts: dict[str, Any]) -> None:
        del model, vocabulary
        seen.append(pq.read_table(work / MARGINS).num_rows - facts["num_heldout_pairs"])

    monkeypatch.setattr(reward_model, "save_reward_model", commit)
    task = RewardTask(config)
    task.save(config.output, task.model, {})
    assert seen == [0]
    assert not (work / REPORT).exists()
