"""What ranks do so that none of them waits for another, and what a training begins with."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from speechalign.config.preference_training import PreferenceTrainingConfig
from speechalign.policy.ar import load_ar
from speechalign.training.pair_comparison import PairComparison
from speechalign.training.preference import is_unmoved
from speechalign.training.reference import Precision
from tests.tiny_stack import build_tiny_stack
from tests.unit.test_preference_resume import some_pairs


def test_a_pair_that_only_keeps_the_ranks_in_step_is_computed_like_one_that_counts(tmp_path: Path):
    stack = build_tiny_stack(tmp_path)
    config = PreferenceTrainingConfig.model_validate({"loss": {"variant": "kto"}})
    model = load_ar(stack.ar).model
    engine: Any = SimpleNamespace(module=model, device=torch.device("cpu"), autocast=nullcontext)
    pairs = some_pairs(3)
    comparison = PairComparison(config, engine, pairs, stack.ar, tmp_path / "reference")
    forwards: list[int] = []

    def count(*_: object) -> None:
        forwards.append(1)

    model.register_forward_hook(count)

    def num_forwards(num_counted: int) -> int:
        forwards.clear()
        with torch.no_grad():
            compared = comparison.compare(pairs[:1], num_counted=num_counted)
        assert torch.isfinite(compared.loss.loss_B).all()
        return len(forwards)

    assert num_forwards(0) == num_forwards(1) == 2


@pytest.mark.parametrize(
    ("loss", "expected", "precision", "holds"),
    [
        (0.6935, 0.6931, "fp32", True),
        (0.6960, 0.6931, "fp32", False),
        (0.6960, 0.6931, "bf16", True),
        (0.8000, 0.6931, "bf16", False),
        (25.002, 25.0, "fp32", True),  # a mean gap of 2e-4 nats at IPO's beta of 0.1
        (25.100, 25.0, "fp32", False),
    ],
)
def test_at_step_0_a_loss_is_that_of_an_unmoved_policy_but_for_rounding(
    loss: float, expected: float, precision: Precision, holds: bool
):
    assert is_unmoved(loss, expected, precision) is holds
