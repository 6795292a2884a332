"""What the door to DeepSpeed does beyond DeepSpeed, on one rank."""

from collections.abc import Iterator

import pytest
import torch

from speechalign.config.policy import ArConfig
from speechalign.config.training import EngineConfig
from speechalign.errors import Diverged
from speechalign.policy.ar import build_ar
from speechalign.policy.vocabulary import Vocabulary
from speechalign.training.engine import Engine
from tests.online_toy import a_process_group

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.tensor([[2, 9, 3, 8]])


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    with a_process_group():
        yield


def an_engine(**changes: object) -> Engine:
    torch.manual_seed(0)
    vocabulary = Vocabulary(symbols="ab", num_codebooks=1, codebook_size=16)
    model = build_ar(ArConfig(num_layers=1, hidden_size=32, num_heads=2), vocabulary)
    values = {"learning_rate": 0.1, "weight_decay": 0.0, "zero_stage": 0} | changes
    return Engine(model, EngineConfig.model_validate(values), num_steps=10)


def loss_of(engine: Engine) -> torch.Tensor:
    return engine.module(input_ids=IDS, labels=IDS).loss


def test_bf16_is_computed_inside_of_deepspeed_which_switches_an_autocast_around_it_off():
    assert an_engine(precision="bf16").module(input_ids=IDS).logits.dtype == torch.bfloat16
    assert an_engine(precision="fp32").module(input_ids=IDS).logits.dtype == torch.float32


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_a_batch_that_is_passed_over_counts_and_teaches_nothing(zero_stage: int):
    engine = an_engine(zero_stage=zero_stage)
    before = [parameter.detach().clone() for parameter in engine.unwrapped.parameters()]
    engine.pass_over()
    assert engine.step_index == 1
    for old, new in zip(before, engine.unwrapped.parameters(), strict=True):
        torch.testing.assert_close(old, new.detach(), rtol=0.0, atol=0.0)


def test_what_came_before_it_in_the_same_update_is_kept():
    accumulated = an_engine(num_accumulated=2)
    before = accumulated.unwrapped.get_parameter("model.norm.weight").detach().clone()
    accumulated.update(loss_of(accumulated))
    accumulated.pass_over()
    assert accumulated.step_index == 1
    after = accumulated.unwrapped.get_parameter("model.norm.weight").detach()
    assert not torch.equal(before, after)


def test_zero_3_cannot_pass_over():
    engine = an_engine(zero_stage=3)
    with pytest.raises(Diverged, match="cannot pass over"):
        engine.pass_over()
