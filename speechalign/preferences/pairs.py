"""Scored samples to preference pairs. Pure: no model, no cluster, no clock.

Golden pairs are SpeechAlign's (Zhang et al. 2024, section 3.1): the codes of the recording are
preferred to what the policy says. Ranked pairs are on-policy (Tian et al. 2024; Hussain et al.
2025): both sides are the policy's, told apart by a reward. Labelled answers have one side only:
KTO (Ethayarajh et al. 2024) asks of each whether it is good, not which of two is better.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from speechalign.config.preferences import PairingConfig
from speechalign.errors import DataError
from speechalign.types import (
    Dropped,
    DropReason,
    Measured,
    PairKind,
    PreferencePair,
    Sample,
    ScoredSample,
)

GOLDEN_MARGIN = 1.0
"""Nobody scored the recording; every golden pair counts the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairing:
    """The pairs of a set of groups, and the groups that made none."""

    pairs: tuple[PreferencePair, ...]
    dropped: tuple[Dropped, ...]

    def counts(self) -> dict[str, int]:
        """Return how many pairs of each kind there are, and how many groups each reason took."""
        kinds = Counter(f"pairs_{_kind(pair)}" for pair in self.pairs)
        reasons = Counter(f"dropped_{dropped.reason}" for dropped in self.dropped)
        return dict(kinds + reasons)


def make_pairs(
    groups: Mapping[str, Sequence[ScoredSample]],
    golden_answers: Mapping[str, tuple[int, ...]],
    config: PairingConfig,
) -> Pairing:
    """Return the pairs of all groups, in the order of the groups.

    Args:
        groups: the samples of each prompt.
        golden_answers: the token ids of each prompt's recording, stop token included.
        config: which pairs to make.

    Raises:
        DataError: not one pair could be made.
    """
    pairs: list[PreferencePair] = []
    dropped: list[Dropped] = []
    for prompt_id, group in groups.items():
        for outcome in _of_group(prompt_id, group, golden_answers[prompt_id], config):
            if isinstance(outcome, Dropped):
                dropped.append(outcome)
            else:
                pairs.append(outcome)
    pairing = Pairing(pairs=tuple(pairs), dropped=tuple(dropped))
    if not pairs:
        raise DataError(
            f"none of {len(groups)} groups made a pair: {pairing.counts()}; sample more per "
            "prompt, lower pairing.min_margin, or look at why judgements fail"
        )
    if PairKind.LABELLED in config.kinds:
        _check_labels(pairing)
    return pairing


def _kind(pair: PreferencePair) -> str:
    if pair.kind is not PairKind.LABELLED:
        return pair.kind
    return "labelled_good" if pair.chosen_token_ids else "labelled_bad"


def _check_labels(pairing: Pairing) -> None:
    """Refuse answers of one sort: nothing tells the policy what the other sort is like."""
    sorts = {
        ("good", "good_above"): any(pair.chosen_token_ids for pair in pairing.pairs),
        ("bad", "bad_below"): any(pair.rejected_token_ids for pair in pairing.pairs),
    }
    for (label, limit), is_there in sorts.items():
        if not is_there:
            raise DataError(
                f"no answer is {label}: {pairing.counts()}; set pairing.{limit} to a reward that "
                "some samples reach (the measures are in the iteration's scored.parquet), or let "
                "golden answers be the good ones (pairing.kinds: [golden, labelled])"
            )


def _of_group(
    prompt_id: str,
    group: Sequence[ScoredSample],
    golden: tuple[int, ...],
    config: PairingConfig,
) -> Iterator[PreferencePair | Dropped]:
    if PairKind.GOLDEN in config.kinds:
        yield golden_pair(prompt_id, group, golden, config)
    if PairKind.RANKED in config.kinds:
        yield from ranked_pairs(prompt_id, group, config)
    if PairKind.LABELLED in config.kinds:
        yield from labelled_answers(prompt_id, group, config)


def golden_pair(
    prompt_id: str,
    group: Sequence[ScoredSample],
    golden: tuple[int, ...],
    config: PairingConfig,
) -> PreferencePair | Dropped:
    """Return the recording preferred to one sample of the group."""
    usable = [s for s in group if not (config.drop_truncated and s.sample.is_truncated)]
    if not usable:
        return Dropped(prompt_id, DropReason.TRUNCATED if group else DropReason.EMPTY)
    rejected = usable[0]
    if config.golden_rejected == "worst":
        ranked = _ranking(usable)
        if not ranked:
            return Dropped(prompt_id, DropReason.UNMEASURED)
        rejected = ranked[-1][1]
    if rejected.sample.token_ids == golden:
        return Dropped(prompt_id, DropReason.IDENTICAL)
    answers = golden, rejected.sample.token_ids
    return _pair(PairKind.GOLDEN, 0, answers, rejected.sample, GOLDEN_MARGIN)


def ranked_pairs(
    prompt_id: str, group: Sequence[ScoredSample], config: PairingConfig
) -> list[PreferencePair | Dropped]:
    """Return best against worst, second best against second worst, as far as they differ.

    Across temperatures, the best of what was drawn sharpest stand against the worst of what was
    drawn at the highest: the reward says which, the temperature makes them differ in a way that
    hundreds of pairs can teach.
    """
    usable = [s for s in group if not (config.drop_truncated and s.sample.is_truncated)]
    ranking = _ranking(usable)
    if len(ranking) < 2:
        return [Dropped(prompt_id, _why_too_few(group, usable))]
    choosable = [entry for entry in ranking if not entry[1].sample.is_truncated]
    rejectable = ranking
    if config.across_temperatures:
        temperatures = [s.sample.temperature for s in group]
        coolest, hottest = min(temperatures), max(temperatures)
        choosable = [e for e in choosable if e[1].sample.temperature == coolest]
        rejectable = [e for e in ranking if e[1].sample.temperature == hottest]
    if not (choosable and rejectable):
        is_cut = any(s.sample.is_truncated for s in group)
        return [Dropped(prompt_id, DropReason.TRUNCATED if is_cut else DropReason.UNMEASURED)]
    outcomes: list[PreferencePair | Dropped] = []
    for rank in range(
        min(config.ranked_per_group, len(ranking) // 2, len(choosable), len(rejectable))
    ):
        (high, best), (low, worst) = choosable[rank], rejectable[-1 - rank]
        if high - low < config.min_margin:
            break
        good, bad = best.sample.token_ids, worst.sample.token_ids
        if good == bad:
            outcomes.append(Dropped(prompt_id, DropReason.IDENTICAL))
        else:
            outcomes.append(_pair(PairKind.RANKED, rank, (good, bad), worst.sample, high - low))
    return outcomes or [Dropped(prompt_id, DropReason.TIED)]


def labelled_answers(
    prompt_id: str, group: Sequence[ScoredSample], config: PairingConfig
) -> list[PreferencePair | Dropped]:
    """Return every sample alone: good above one limit, bad below the other."""
    assert config.good_above is not None and config.bad_below is not None  # noqa: S101 - validated
    usable = [s for s in group if not (config.drop_truncated and s.sample.is_truncated)]
    ranking = _ranking(usable)
    if not ranking:
        reason = DropReason.UNMEASURED if usable else DropReason.TRUNCATED
        return [Dropped(prompt_id, reason if group else DropReason.EMPTY)]
    outcomes: list[PreferencePair | Dropped] = []
    for reward, scored in ranking:
        sample, number = scored.sample, scored.sample.sample_index
        if reward > config.good_above and not sample.is_truncated:
            answers, margin = (sample.token_ids, ()), reward - config.good_above
        elif reward < config.bad_below:
            answers, margin = ((), sample.token_ids), config.bad_below - reward
        else:
            continue
        outcomes.append(_pair(PairKind.LABELLED, number, answers, sample, margin))
    return outcomes or [Dropped(prompt_id, DropReason.TIED)]


def _why_too_few(group: Sequence[ScoredSample], usable: Sequence[ScoredSample]) -> DropReason:
    if len(group) < 2:
        return DropReason.EMPTY  # nothing to compare with, whatever the judges say
    return DropReason.TRUNCATED if len(usable) < 2 else DropReason.UNMEASURED


def _ranking(group: Sequence[ScoredSample]) -> list[tuple[float, ScoredSample]]:
    """Return the measured samples, best first; equal rewards keep the order of sampling."""
    measured = [(s.reward.value, s) for s in group if isinstance(s.reward, Measured)]
    return sorted(measured, key=lambda entry: (-entry[0], entry[1].sample.sample_index))


def _pair(
    kind: PairKind,
    number: int,
    answers: tuple[tuple[int, ...], tuple[int, ...]],
    sample: Sample,
    margin: float,
) -> PreferencePair:
    """Return the pair of (chosen, rejected) answers to the prompt of a sample."""
    chosen, rejected = answers
    return PreferencePair(
        pair_id=f"{sample.prompt_id}/v{sample.policy_version}/{kind}/{number}",
        kind=kind,
        prompt_id=sample.prompt_id,
        policy_version=sample.policy_version,
        codec_fingerprint=sample.codec_fingerprint,
        prompt_token_ids=sample.prompt_token_ids,
        chosen_token_ids=chosen,
        rejected_token_ids=rejected,
        margin=margin,
    )
