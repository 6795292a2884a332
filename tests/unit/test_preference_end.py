"""What is kept of a training on pairs that diverges, or that nothing comes of."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from speechalign.artifacts import is_committed, manifest_facts
from speechalign.errors import Diverged
from speechalign.training import pair_comparison
from speechalign.training.losses import PairLoss, pair_loss
from tests.online_toy import a_process_group
from tests.tiny_stack import TinyStack, build_tiny_stack
from tests.unit.test_preference_resume import LEARNABLE_PAIRS, Training

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyStack]:
    with a_process_group():
        yield build_tiny_stack(tmp_path_factory.mktemp("stack"))


def break_after(num_updates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no loss be finite after so many updates; looks, which need no gradient, are spared."""
    seen: list[int] = []

    def broken(*arguments: Any) -> PairLoss:
        loss = pair_loss(*arguments)
        if not torch.is_grad_enabled():
            return loss
        seen.append(1)
        return replace(loss, loss_B=loss.loss_B * (1.0 if len(seen) <= num_updates else torch.nan))

    monkeypatch.setattr(pair_comparison, "pair_loss", broken)


def test_a_training_that_diverges_keeps_the_best_policy_and_says_why(
    stack: TinyStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    training = Training(stack, tmp_path, pairs=LEARNABLE_PAIRS)
    break_after(4, monkeypatch)
    training.run()
    facts = manifest_facts(training.paths.output)
    assert facts["best_step"] == 6  # a look amid the bad ones: the weights are those of update 4
    assert "not finite 3 times in a row" in facts["stop_reason"]


def test_a_training_that_diverges_before_anything_was_better_ends_with_an_error(
    stack: TinyStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    training = Training(stack, tmp_path, pairs=LEARNABLE_PAIRS)
    break_after(0, monkeypatch)
    with pytest.raises(Diverged, match="nothing before it was better than the start"):
        training.run()
    assert not is_committed(training.paths.output)


@pytest.mark.parametrize(("learning_rate", "knows"), [(3e-3, True), (30.0, False)])
def test_chain_of_hindsight_that_learned_nothing_is_not_asked_with_feedback(
    stack: TinyStack, tmp_path: Path, learning_rate: float, knows: bool
):
    training = Training(
        stack,
        tmp_path,
        pairs=LEARNABLE_PAIRS,
        method="coh",
        loss={},
        engine={"learning_rate": learning_rate, "warmup_steps": 1},
    )
    training.run()
    facts = manifest_facts(training.paths.output)
    assert (facts["best_step"] > 0) is knows
    assert facts.get("knows_feedback", False) is knows
