"""KTO without pairs: answers that are good or bad alone, from their reward to the weights."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError

from speechalign.artifacts import committed_folder, manifest_facts
from speechalign.config.align import AlignConfig
from speechalign.config.policy import ArConfig
from speechalign.config.preference_training import DpoLossConfig, PreferenceTrainingConfig
from speechalign.config.preferences import PairingConfig
from speechalign.errors import ConfigError, DataError
from speechalign.policy.ar import build_ar, load_ar
from speechalign.policy.vocabulary import Vocabulary
from speechalign.preferences.pairs import labelled_answers, make_pairs
from speechalign.rows import pairs_from_table, pairs_to_table
from speechalign.training.losses import PairLogprobs, dpo_loss, loss_of_an_unmoved_policy
from speechalign.training.pair_comparison import Compared, check_pairs, good_share
from speechalign.training.pair_means import count_in, no_means_yet
from speechalign.training.preference import TrainingPaths, preference_worker
from speechalign.training.reference import mismatched, pair_logprobs
from speechalign.training.stored_pairs import PAIRS, read_both_sides
from speechalign.types import Dropped, DropReason, PairKind, PreferencePair
from tests.builders import some_labelled_answers, some_pairs
from tests.online_toy import a_process_group
from tests.tiny_stack import build_tiny_stack
from tests.unit.test_pairs import GOLDEN, scored

LABELS = PairingConfig(kinds=(PairKind.LABELLED,), good_above=0.5, bad_below=-0.5)
KTO = DpoLossConfig(variant="kto", beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)


def sides(outcomes: list[Any]) -> list[tuple[tuple[int, ...], tuple[int, ...], float]]:
    pairs = [outcome for outcome in outcomes if isinstance(outcome, PreferencePair)]
    return [(p.chosen_token_ids, p.rejected_token_ids, round(p.margin, 6)) for p in pairs]


def test_every_sample_is_good_or_bad_by_its_reward_or_left_out():
    rewards = [1.0, 0.5, 0.0, -0.75, "asr timed out"]
    group = [scored(reward, index=index) for index, reward in enumerate(rewards)]
    outcomes = labelled_answers("p0", group, LABELS)
    assert sides(outcomes) == [((8, 1), (), 0.5), ((), (11, 1), 0.25)]
    ids = [p.pair_id for p in outcomes if isinstance(p, PreferencePair)]
    assert ids == ["p0/v3/labelled/0", "p0/v3/labelled/3"]


def test_a_truncated_sample_is_never_good():
    group = [scored(reward, index=i, is_truncated=True) for i, reward in enumerate([0.9, -0.9])]
    assert sides(labelled_answers("p0", group, LABELS)) == [((), (9, 1), 0.4)]
    without = LABELS.model_copy(update={"drop_truncated": True})
    assert labelled_answers("p0", group, without) == [Dropped("p0", DropReason.TRUNCATED)]


@pytest.mark.parametrize(
    ("group", "reason"),
    [
        ([], DropReason.EMPTY),
        ([scored("asr timed out")], DropReason.UNMEASURED),
        ([scored(0.1)], DropReason.TIED),
    ],
)
def test_a_group_without_a_label_says_why(group: list[Any], reason: DropReason):
    assert labelled_answers("p0", group, LABELS) == [Dropped("p0", reason)]


def test_labels_of_one_sort_are_refused():
    groups = {"p0": [scored(0.9), scored(-0.9, index=1)], "p1": [scored(0.8)]}
    golden = {"p0": GOLDEN, "p1": GOLDEN}
    counts = make_pairs(groups, golden, LABELS).counts()
    assert counts == {"pairs_labelled_good": 2, "pairs_labelled_bad": 1}
    with pytest.raises(DataError, match=r"no answer is bad.*pairing\.bad_below"):
        make_pairs({"p1": groups["p1"]}, golden, LABELS)
    with pytest.raises(DataError, match=r"no answer is good.*pairing\.good_above"):
        make_pairs({"p0": groups["p0"][1:]}, golden, LABELS)
    both = LABELS.model_copy(update={"kinds": (PairKind.GOLDEN, PairKind.LABELLED)})
    counts = make_pairs({"p0": groups["p0"][1:]}, golden, both).counts()
    assert counts == {"pairs_golden": 1, "pairs_labelled_bad": 1}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kinds": ["labelled"]}, "need good_above and bad_below"),
        ({"kinds": ["labelled"], "good_above": 0.0, "bad_below": 0.1}, "would be good and bad"),
        ({"kinds": ["ranked"], "good_above": 0.0}, "remove them"),
    ],
)
def test_limits_are_asked_for_where_they_are_used(values: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        PairingConfig.model_validate(values)


def test_a_recipe_without_kto_cannot_have_labelled_answers():
    values: dict[str, Any] = {
        "run_dir": "r", "golden": "g", "policy": "p", "nar": "n",
        "judges": [{"kind": "signal"}],
        "reward": {"terms": [{"measure": "silence_ratio", "weight": -1.0}]},
        "pairing": {"kinds": ["labelled"], "good_above": 0.0, "bad_below": 0.0},
        "training": {"method": "dpo", "loss": {"variant": "kto"}},
    }  # fmt: skip
    assert AlignConfig.model_validate(values).pairing.kinds == (PairKind.LABELLED,)
    for training in ({"method": "dpo"}, {"method": "coh"}, {"method": "best_of_n"}):
        with pytest.raises(ValidationError, match="only kto learns from them"):
            AlignConfig.model_validate(values | {"training": training})


def test_an_answer_alone_is_read_back_as_it_was_and_has_one_side():
    answers = some_labelled_answers(3)
    assert pairs_from_table(pairs_to_table(answers)) == answers
    with pytest.raises(DataError, match="good or bad, not both"):
        replace(some_pairs(1)[0], kind=PairKind.LABELLED)
    with pytest.raises(DataError, match="one side is empty"):
        replace(answers[0], chosen_token_ids=())
    with pytest.raises(DataError, match="one side is empty"):
        replace(answers[0], kind=PairKind.RANKED)


def test_answers_alone_are_refused_where_two_are_compared(tmp_path: Path):
    answers = some_labelled_answers(3)
    check_pairs(PreferenceTrainingConfig(loss=KTO), answers)
    check_pairs(PreferenceTrainingConfig(), some_pairs(2))
    for config in (PreferenceTrainingConfig(), PreferenceTrainingConfig(method="coh")):
        with pytest.raises(ConfigError, match="3 of 3 answers are labelled"):
            check_pairs(config, answers)
    with committed_folder(tmp_path / "pairs", {}) as partial:
        pq.write_table(pairs_to_table(answers), partial / PAIRS)
    with pytest.raises(DataError, match=r"3 of the 3 pairs of .* are labelled"):
        read_both_sides(tmp_path / "pairs")


def sums(chosen: list[float], rejected: list[float]) -> PairLogprobs:
    """Return those of a pair, a good answer and a bad one, of 2 tokens a side that is there."""
    return PairLogprobs(
        chosen_B=torch.tensor(chosen),
        rejected_B=torch.tensor(rejected),
        chosen_tokens_B=torch.tensor([2, 2, 0]),
        rejected_tokens_B=torch.tensor([2, 0, 2]),
    )


POLICY = sums([-2.0, -2.0, 0.0], [-6.0, 0.0, -6.0])
REFERENCE = sums([-3.0, -3.0, 0.0], [-4.0, 0.0, -4.0])
# good answers gained 1 nat, bad ones lost 2


def test_the_loss_of_an_answer_alone_is_its_own_term():
    output = dpo_loss(POLICY, REFERENCE, replace_anchor(0.1), kl=0.4)
    good = 2 * (1 - 1 / (1 + math.exp(-0.5 * (1 - 0.4))))
    bad = 3 * (1 - 1 / (1 + math.exp(-0.5 * (0.4 + 2))))
    expected = [(good + bad) / 2 + 0.1, good + 0.1, bad]  # the chosen cost 1 nat a token
    assert output.loss_B.tolist() == pytest.approx(expected)
    assert output.margin_B.tolist() == pytest.approx([1.5, 0.5, 1.0])


def replace_anchor(weight: float) -> DpoLossConfig:
    return KTO.model_copy(update={"sft_weight": weight})


def test_at_step_0_the_loss_depends_on_the_share_of_good_answers():
    loss_B = dpo_loss(REFERENCE, REFERENCE, KTO).loss_B
    for rows, share in (([0], 0.5), ([1], 1.0), ([2], 0.0), ([0, 1, 2, 2], 0.375)):
        expected = loss_of_an_unmoved_policy(KTO, share)
        assert float(loss_B[rows].mean()) == pytest.approx(expected)
    assert good_share([*some_pairs(1), *some_labelled_answers(3)]) == pytest.approx(1.5 / 4)


def test_the_means_of_a_side_are_over_the_answers_that_have_it():
    with a_process_group():
        means = no_means_yet()
        output = dpo_loss(POLICY, REFERENCE, replace_anchor(0.1))
        count_in(means, Compared(loss=output, policy=POLICY, reference=REFERENCE))
        seen = means.over_ranks(torch.device("cpu"))
    assert seen["chosen_logprob"] == pytest.approx(-1.0)
    assert seen["rejected_logprob"] == pytest.approx(-3.0)
    assert (seen["chosen_reward"], seen["rejected_reward"]) == pytest.approx((0.5, -1.0))
    assert seen["chosen_drop"] == pytest.approx(-0.5)
    assert seen["anchor"] == pytest.approx(2 / 3)  # what the loss has of it, row by row
    assert seen["accuracy"] == 1.0


def a_model() -> torch.nn.Module:
    torch.manual_seed(0)
    vocabulary = Vocabulary(symbols=" ab", num_codebooks=1, codebook_size=16)
    return build_ar(ArConfig(num_layers=1, hidden_size=32, num_heads=2), vocabulary).eval()


def test_an_answer_alone_is_scored_as_in_a_pair_and_costs_one_row():
    model, pairs, answers = a_model(), some_pairs(3), some_labelled_answers(3)
    rows: list[int] = []

    def count(_module: object, _args: object, named: dict[str, Any], _output: object) -> None:
        rows.append(len(named["input_ids"]))

    model.register_forward_hook(count, with_kwargs=True)
    both, alone = pair_logprobs(model, pairs), pair_logprobs(model, answers)
    assert rows == [6, 3]
    assert alone.has_chosen_B.tolist() == [True, False, False]
    expected = both.chosen_B * alone.has_chosen_B, both.rejected_B * alone.has_rejected_B
    torch.testing.assert_close(alone.chosen_B, expected[0])
    torch.testing.assert_close(alone.rejected_B, expected[1])
    known = [
        ([-1.0] * len(a.chosen_token_ids), [-1.0] * len(a.rejected_token_ids)) for a in answers
    ]
    drift = pair_logprobs(model, answers, reference=known).drift
    assert drift is not None
    said_B = alone.normalised().chosen_B + alone.normalised().rejected_B
    torch.testing.assert_close(drift.kl_k1_B, -1.0 - said_B.detach())
    assert (drift.entropy_B > 0).all()


def test_an_answer_alone_meets_the_only_answer_of_another_prompt():
    answers = some_labelled_answers(3)
    found = mismatched(answers)
    assert [pair.chosen_token_ids for pair in found] == [
        answers[1].rejected_token_ids, answers[2].rejected_token_ids, answers[0].chosen_token_ids
    ]  # fmt: skip
    assert {pair.rejected_token_ids for pair in found} == {()}


@pytest.mark.filterwarnings("ignore")
def test_a_training_on_answers_alone_makes_the_good_likelier_and_the_bad_less(tmp_path: Path):
    answers = some_labelled_answers(40, chosen=(8, 16), rejected=(16, 24))
    config = PreferenceTrainingConfig.model_validate(
        {
            "num_epochs": 4,
            "pairs_per_step": 4,
            "heldout_share": 0.2,
            "loss": {"variant": "kto", "desirable_weight": 2.0, "beta": 0.5},
            "early_stop": {"every": 5, "max_chosen_drop": 9.0},
            "engine": {"learning_rate": 3e-3, "warmup_steps": 3},
            "workers": {"num_workers": 1},
        }
    )
    with a_process_group():
        stack = build_tiny_stack(tmp_path / "stack")
        with committed_folder(tmp_path / "pairs", {}) as partial:
            pq.write_table(pairs_to_table(answers), partial / PAIRS)
        paths = TrainingPaths(
            policy=stack.ar, reference=stack.ar, pairs=tmp_path / "pairs", output=tmp_path / "new"
        )
        names = ("policy", "reference", "pairs", "output")
        settings = {
            "config": config.model_dump(mode="json"),
            "paths": {name: str(getattr(paths, name)) for name in names},
        }
        preference_worker(settings)
    assert manifest_facts(paths.output)["best_step"] > 0
    with torch.no_grad():
        before = pair_logprobs(load_ar(stack.ar).model, answers)
        after = pair_logprobs(load_ar(paths.output).model, answers)
    assert after.chosen_B.sum() > before.chosen_B.sum()
    assert after.rejected_B.sum() < before.rejected_B.sum()
