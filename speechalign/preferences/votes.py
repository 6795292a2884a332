"""People's votes to pairs: two samples of one prompt, and how many listeners preferred which. Pure.

A line of a file of votes is one listener's choice. Listeners who disagree are outvoted; as many
for as against is a tie, and teaches nothing.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from speechalign.types import PairKind, PreferencePair, Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenerVote:
    """One listener preferred one sample of a prompt to another."""

    row_id: str
    """Where it stands in the file; names it in the quarantine."""
    prompt_id: str
    chosen: int
    """A sample's index within its group."""
    rejected: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Voted:
    """The pairs of a file of votes, and what was left out."""

    pairs: tuple[PreferencePair, ...]
    num_ties: int
    quarantine: tuple[tuple[str, str], ...]
    """(row, reason) of the votes on what cannot be compared."""


def pairs_of_votes(
    votes: Sequence[ListenerVote], samples: Mapping[tuple[str, int], Sample]
) -> Voted:
    """Return a pair for every two samples of which one has more votes than the other.

    Args:
        votes: in any order.
        samples: by prompt and index within its group.
    """
    ballots: dict[tuple[str, int, int], Counter[int]] = {}
    quarantine: list[tuple[str, str]] = []
    for vote in votes:
        reason = _why_not(vote, samples)
        if reason:
            quarantine.append((vote.row_id, reason))
            continue
        low, high = sorted((vote.chosen, vote.rejected))
        ballots.setdefault((vote.prompt_id, low, high), Counter())[vote.chosen] += 1
    pairs: list[PreferencePair] = []
    num_ties = 0
    for (prompt_id, low, high), ballot in ballots.items():
        best = low if ballot[low] > ballot[high] else high
        if ballot[low] == ballot[high]:
            num_ties += 1
        elif samples[prompt_id, best].is_truncated:
            reason = f"sample {prompt_id}/{best} won, but is truncated, and never chosen"
            quarantine.append((f"{prompt_id}/{low}-{high}", reason))
        else:
            pairs.append(_pair(prompt_id, low, high, ballot, samples))
    return Voted(pairs=tuple(pairs), num_ties=num_ties, quarantine=tuple(quarantine))


def _why_not(vote: ListenerVote, samples: Mapping[tuple[str, int], Sample]) -> str:
    for index in (vote.chosen, vote.rejected):
        if (vote.prompt_id, index) not in samples:
            return f"there is no sample {vote.prompt_id}/{index}"
    chosen, rejected = (samples[vote.prompt_id, i] for i in (vote.chosen, vote.rejected))
    if not (chosen.token_ids and rejected.token_ids):
        return "one of the samples is empty"
    if chosen.token_ids == rejected.token_ids:
        return "both samples are the same tokens"
    return ""


def _pair(
    prompt_id: str,
    low: int,
    high: int,
    ballot: Counter[int],
    samples: Mapping[tuple[str, int], Sample],
) -> PreferencePair:
    best, worst = (low, high) if ballot[low] > ballot[high] else (high, low)
    chosen, rejected = samples[prompt_id, best], samples[prompt_id, worst]
    return PreferencePair(
        pair_id=f"{prompt_id}/v{rejected.policy_version}/{PairKind.VOTED}/{low}-{high}",
        kind=PairKind.VOTED,
        prompt_id=prompt_id,
        policy_version=rejected.policy_version,
        codec_fingerprint=rejected.codec_fingerprint,
        prompt_token_ids=rejected.prompt_token_ids,
        chosen_token_ids=chosen.token_ids,
        rejected_token_ids=rejected.token_ids,
        margin=(ballot[best] - ballot[worst]) / ballot.total(),
    )
