"""What the driver says of an online training that has ended."""

from pathlib import Path

import pytest

from speechalign.artifacts import committed_folder, is_committed
from speechalign.pipeline.online import say_why_it_ended
from speechalign.training.online import OnlinePaths

NOT_A_NUMBER = "step 3: the critic's loss is not a number; lower training.engine.learning_rate"


def ended(folder: Path, reason: str, best_step: int) -> OnlinePaths:
    paths = OnlinePaths(policy=folder, reference=folder, output=folder / "policy")
    facts = {"stop_reason": reason, "best_step": best_step, "num_steps": 3}
    with committed_folder(paths.output, facts):
        pass
    return paths


@pytest.mark.parametrize(
    ("reason", "best_step", "level"),
    [
        ("all steps done", 2, "INFO"),
        ("step 3: the entropy fell", 0, "WARNING"),
        (NOT_A_NUMBER, 2, "WARNING"),
    ],
)
def test_the_reason_is_told_and_the_policy_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, reason: str, best_step: int, level: str
):
    paths = ended(tmp_path, reason, best_step)
    with caplog.at_level("INFO"):
        say_why_it_ended(paths)
    (record,) = caplog.records
    assert record.levelname == level
    assert record.getMessage() == (
        f"online training ended after 3 steps: {reason}; the new policy is that of step {best_step}"
    )
    assert is_committed(paths.output)
