import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speechalign.config.preference_training import EarlyStopConfig
from speechalign.config.training import EngineConfig
from speechalign.policy.answer_batch import collate_answers
from speechalign.policy.logprobs import answer_logprobs
from speechalign.training.batches import BatchPlan, rows_of_rank
from speechalign.training.early_stop import EarlyStop, Look
from speechalign.training.engine import schedule_share

ROWS = [((2, 3), (8, 9, 1)), ((2,), (10, 1))]


def test_the_answer_is_masked_in_with_its_stop_token_and_nothing_else():
    batch = collate_answers(ROWS)
    assert batch.input_ids_BS.tolist() == [[2, 3, 8, 9, 1], [2, 10, 1, 0, 0]]
    assert batch.answer_mask_BS.tolist() == [
        [False, False, True, True, True],
        [False, True, True, False, False],
    ]
    assert batch.attention_mask_BS.sum(1).tolist() == [5, 3]


def nll(logits_BSV: torch.Tensor) -> float:
    batch = collate_answers(ROWS)
    return float(answer_logprobs(logits_BSV, batch.input_ids_BS, batch.answer_mask_BS).sum())


def test_logits_of_prompt_and_padding_do_not_count_and_those_of_the_answer_do():
    logits_BSV = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    batch = collate_answers(ROWS)
    # the token at s is predicted at s - 1
    counts_BS = torch.nn.functional.pad(batch.answer_mask_BS[:, 1:], (0, 1))
    for row in range(2):
        for position in range(5):
            changed = logits_BSV.clone()
            changed[row, position] = changed[row, position].flip(0)
            assert (nll(changed) != nll(logits_BSV)) == bool(counts_BS[row, position])


def test_logprobs_of_a_uniform_model_by_hand():
    assert nll(torch.zeros(2, 5, 16)) == pytest.approx(-5 * torch.log(torch.tensor(16.0)).item())


@given(st.lists(st.integers(1, 400), min_size=4, max_size=60), st.integers(1, 4))
def test_an_epoch_uses_no_row_twice(lengths: list[int], rows: int):
    plan = BatchPlan(lengths, rows, seed=3)
    used = [row for step in range(plan.batches_per_epoch) for row in plan.batch(step)]
    assert len(set(used)) == len(used) == plan.batches_per_epoch * rows


def test_the_order_of_batches_is_the_same_after_a_restart():
    lengths = list(range(50))
    onward = [BatchPlan(lengths, 4, seed=1).batch(step) for step in range(30)]
    plan = BatchPlan(lengths, 4, seed=1)
    assert [plan.batch(step) for step in range(30)] == onward
    assert onward[: plan.batches_per_epoch] != onward[plan.batches_per_epoch :][:12]


def test_ranks_share_the_rows_of_a_batch():
    rows = [5, 6, 7, 8, 9]
    assert rows_of_rank(rows, 0, 2) + rows_of_rank(rows, 1, 2) == [5, 7, 9, 6, 8]


def test_the_learning_rate_rises_stays_and_falls():
    config = EngineConfig(warmup_steps=2, decay_share=0.5, final_share=0.1)
    shares = [schedule_share(config, step, 8) for step in range(8)]
    assert shares == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25])


def look(step: int, loss: float, drop: float = 0.0) -> Look:
    return Look(step=step, loss=loss, accuracy=0.5, chosen_drop=drop)


def test_training_stops_after_enough_looks_without_a_better_one():
    stop = EarlyStop(EarlyStopConfig(patience=2))
    assert [stop.see(look(s, loss)) for s, loss in enumerate([0.6, 0.5, 0.55])] == [None] * 3
    reason = stop.see(look(3, 0.52))
    assert reason is not None
    assert "not better than 0.5000 of step 1" in reason
    assert stop.best == look(1, 0.5)


def test_a_policy_whose_chosen_answers_collapse_is_never_the_best():
    stop = EarlyStop(EarlyStopConfig(max_chosen_drop=0.3))
    assert stop.see(look(0, 0.69)) is None
    reason = stop.see(look(1, 0.2, drop=0.5))
    assert reason is not None
    assert "lost 0.50 nats a token" in reason
    assert stop.best == look(0, 0.69)


def test_muon_and_zero_refuse_to_meet():
    with pytest.raises(ValueError, match="muon needs whole matrices"):
        EngineConfig(optimizer="muon", zero_stage=2)
