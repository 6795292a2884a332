"""The best weights survive a kill."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import nn

from speechalign.artifacts import manifest_facts
from speechalign.errors import Diverged
from speechalign.training.best_weights import BestWeights
from speechalign.training.engine import Engine


class FakeEngine:
    """A model of one weight, which is the number of updates."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.model = nn.Linear(1, 1, bias=False)
        self.step_index = 0

    @contextmanager
    def whole_weights(self) -> Iterator[nn.Module]:
        yield self.model


def offer(best: BestWeights, engine: FakeEngine, step: int, loss: float) -> None:
    engine.step_index = step
    with torch.no_grad():
        engine.model.weight.fill_(step)
    best.offer(cast("Engine", engine), loss)


def loaded(best: BestWeights) -> tuple[int, float]:
    model = nn.Linear(1, 1, bias=False)
    return best.load_into(model), float(model.weight.detach())


def test_the_lowest_loss_is_kept_and_an_equal_one_is_not_lower(tmp_path: Path):
    best, engine = BestWeights(tmp_path / "best", is_resumed=False), FakeEngine()
    for step, loss in ((1, 0.7), (2, 0.5), (3, 0.5), (4, 0.6), (5, float("nan"))):
        offer(best, engine, step, loss)
    assert loaded(best) == (2, 2.0)
    assert manifest_facts(tmp_path / "best") == {"step": 2, "heldout_loss": 0.5}


def test_a_resumed_training_knows_the_best_of_before_the_kill(tmp_path: Path):
    engine = FakeEngine()
    offer(BestWeights(tmp_path / "best", is_resumed=False), engine, 1, 0.5)
    resumed = BestWeights(tmp_path / "best", is_resumed=True)
    offer(resumed, engine, 2, 0.6)
    assert loaded(resumed) == (1, 1.0)


def test_a_training_that_starts_anew_drops_what_it_finds(tmp_path: Path):
    engine = FakeEngine()
    offer(BestWeights(tmp_path / "best", is_resumed=False), engine, 1, 0.5)
    anew = BestWeights(tmp_path / "best", is_resumed=False)
    offer(anew, engine, 2, 0.6)
    assert loaded(anew) == (2, 2.0)


def test_losses_that_were_never_finite_leave_no_model(tmp_path: Path):
    best = BestWeights(tmp_path / "best", is_resumed=False)
    offer(best, FakeEngine(), 1, float("nan"))
    with pytest.raises(Diverged, match="never a finite number"):
        loaded(best)
