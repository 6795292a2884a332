from dataclasses import replace

import pytest

from speechalign.config.preferences import PairingConfig
from speechalign.errors import DataError
from speechalign.preferences.pairs import golden_pair, make_pairs, ranked_pairs
from speechalign.types import (
    Dropped,
    DropReason,
    Measured,
    PairKind,
    PreferencePair,
    Sample,
    Score,
    ScoredSample,
    Unmeasured,
)

CONFIG = PairingConfig(min_margin=0.2)
GOLDEN = (100, 101, 1)


def scored(reward: float | str, *, index: int = 0, is_truncated: bool = False) -> ScoredSample:
    score: Score = Unmeasured(reward) if isinstance(reward, str) else Measured(reward)
    sample = Sample(
        prompt_id="p0",
        sample_index=index,
        policy_version=3,
        codec_fingerprint="f",
        prompt_token_ids=(2, 4),
        token_ids=(8 + index, 1),
        logprobs=(-0.5, -0.5),
        temperature=1.0,
        is_truncated=is_truncated,
    )
    return ScoredSample(sample=sample, measures={}, reward=score)


def test_the_best_sample_is_preferred_to_the_worst():
    group = [scored(0.5, index=0), scored(0.9, index=1), scored(0.1, index=2)]
    (pair,) = ranked_pairs("p0", group, CONFIG)
    assert isinstance(pair, PreferencePair)
    assert (pair.chosen_token_ids, pair.rejected_token_ids) == ((9, 1), (10, 1))
    assert pair.margin == pytest.approx(0.8)
    assert (pair.kind, pair.policy_version, pair.prompt_token_ids) == (PairKind.RANKED, 3, (2, 4))


def test_the_second_best_meets_the_second_worst_while_they_differ_enough():
    rewards = [1.0, 0.8, 0.7, 0.1]
    group = [scored(reward, index=i) for i, reward in enumerate(rewards)]
    config = PairingConfig(min_margin=0.05, ranked_per_group=2)
    pairs = ranked_pairs("p0", group, config)
    assert [round(p.margin, 3) for p in pairs if isinstance(p, PreferencePair)] == [0.9, 0.1]
    assert len(ranked_pairs("p0", group, config.model_copy(update={"min_margin": 0.2}))) == 1


def test_a_failed_judge_never_makes_a_rejected_sample():
    group = [scored(0.9, index=0), scored("asr timed out", index=1)]
    assert ranked_pairs("p0", group, CONFIG) == [Dropped("p0", DropReason.UNMEASURED)]


def test_a_margin_below_the_threshold_is_a_tie():
    group = [scored(0.5, index=0), scored(0.6, index=1)]
    assert ranked_pairs("p0", group, CONFIG) == [Dropped("p0", DropReason.TIED)]


def test_a_truncated_sample_may_be_rejected_but_never_chosen():
    group = [scored(0.9, index=0, is_truncated=True), scored(0.6, index=1), scored(0.1, index=2)]
    (pair,) = ranked_pairs("p0", group, CONFIG)
    assert isinstance(pair, PreferencePair)
    assert pair.chosen_token_ids == (9, 1)
    group = [scored(0.1, index=0, is_truncated=True), scored(0.6, index=1)]
    (pair,) = ranked_pairs("p0", group, CONFIG)
    assert isinstance(pair, PreferencePair)
    assert pair.rejected_token_ids == (8, 1)


def test_truncated_samples_can_be_left_out_altogether():
    group = [scored(0.1, index=0, is_truncated=True), scored(0.6, index=1)]
    config = PairingConfig(drop_truncated=True)
    assert ranked_pairs("p0", group, config) == [Dropped("p0", DropReason.TRUNCATED)]


def test_the_recording_is_preferred_to_the_first_sample_whatever_its_reward():
    group = [scored("no judge", index=0), scored(0.1, index=1)]
    pair = golden_pair("p0", group, GOLDEN, CONFIG)
    assert isinstance(pair, PreferencePair)
    assert (pair.chosen_token_ids, pair.rejected_token_ids) == (GOLDEN, (8, 1))


def test_the_recording_can_be_preferred_to_the_worst_sample():
    group = [scored(0.5, index=0), scored(0.1, index=1), scored("no judge", index=2)]
    pair = golden_pair("p0", group, GOLDEN, PairingConfig(golden_rejected="worst"))
    assert isinstance(pair, PreferencePair)
    assert pair.rejected_token_ids == (9, 1)


def test_a_sample_equal_to_the_recording_makes_no_pair():
    outcome = golden_pair("p0", [scored(0.5)], (8, 1), CONFIG)
    assert outcome == Dropped("p0", DropReason.IDENTICAL)


def test_both_kinds_can_be_made_of_one_group_and_are_counted():
    groups = {"p0": [scored(0.9, index=0), scored(0.1, index=1)], "p1": [scored(0.3)]}
    kinds = (PairKind.GOLDEN, PairKind.RANKED)
    config = PairingConfig(kinds=kinds)
    pairing = make_pairs(groups, {"p0": GOLDEN, "p1": GOLDEN}, config)
    counts = {"pairs_golden": 2, "pairs_ranked": 1, "dropped_empty": 1}
    assert pairing.counts() == counts


def at(temperature: float, reward: float, *, index: int, is_truncated: bool = False):
    made = scored(reward, index=index, is_truncated=is_truncated)
    return replace(made, sample=replace(made.sample, temperature=temperature))


def test_across_temperatures_the_best_of_the_sharpest_stands_against_the_worst_of_the_hottest():
    config = PairingConfig(across_temperatures=True, ranked_per_group=2, min_margin=0.1)
    group = [
        at(1.0, 0.9, index=0),
        at(0.5, 0.8, index=1),
        at(1.0, 0.3, index=2),
        at(0.5, 0.1, index=3),
    ]
    (pair,) = ranked_pairs("p0", group, config)  # the second would be 0.1 against 0.9
    assert isinstance(pair, PreferencePair)
    assert (pair.chosen_token_ids, pair.rejected_token_ids) == ((9, 1), (10, 1))
    hot = [at(1.0, 0.9, index=0), at(0.5, 0.8, index=1, is_truncated=True)]
    assert ranked_pairs("p0", hot, config) == [Dropped("p0", DropReason.TRUNCATED)]


def test_no_pair_at_all_stops_the_run_with_the_reasons():
    groups = {"p0": [scored(0.5, index=0), scored(0.5, index=1)]}
    with pytest.raises(DataError, match="dropped_tied': 1"):
        make_pairs(groups, {"p0": GOLDEN}, CONFIG)


def test_a_group_is_dropped_for_what_is_wrong_with_it():
    alone = [scored(0.3)]
    assert ranked_pairs("p0", alone, CONFIG) == [Dropped("p0", DropReason.EMPTY)]
    cut = [scored(0.9, index=0, is_truncated=True), scored(0.1, index=1, is_truncated=True)]
    assert ranked_pairs("p0", cut, CONFIG) == [Dropped("p0", DropReason.TRUNCATED)]
    twin = replace(scored(0.1), sample=scored(0.9).sample)
    assert ranked_pairs("p0", [scored(0.9), twin], CONFIG) == [Dropped("p0", DropReason.IDENTICAL)]
    assert golden_pair("p0", [], GOLDEN, CONFIG) == Dropped("p0", DropReason.EMPTY)
