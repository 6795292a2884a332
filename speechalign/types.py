"""The nouns of speechalign, in the order in which a run creates them.

    Prompt -> Sample -> Clip -> ScoredSample -> PreferencePair

Each is frozen and checks itself on creation, so a function that receives one need not.
Nothing here imports torch, Ray or vLLM: the driver, a worker and a replica share these.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from speechalign.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One text to be spoken, the voice to speak it in, and how a person spoke it."""

    prompt_id: str
    text: str
    phonemes: str
    speaker_id: str
    speaker_codes_KT: NDArray[np.int16]
    """Golden codes of another recording of the speaker: the voice to continue."""
    golden_codes_KT: NDArray[np.int16]
    """Codes of the real recording of `text`."""
    codec_fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One answer of the policy to one prompt, in token ids, the stop token included."""

    prompt_id: str
    sample_index: int
    policy_version: int
    codec_fingerprint: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of the sampler, one per token; the trainer recomputes its own."""
    temperature: float
    """It was drawn at; 1 for a recording, which nobody drew."""
    is_truncated: bool
    """Whether the answer hit the length cap, so that it has no stop token."""

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.logprobs):
            raise DataError(
                f"sample {self.sample_id}: {len(self.token_ids)} token ids "
                f"but {len(self.logprobs)} logprobs; the engine must return one per token"
            )

    @property
    def sample_id(self) -> str:
        """The id of a sample, unique within a policy version."""
        return f"{self.prompt_id}/{self.sample_index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """A rendered sample, as the judges hear it."""

    sample_id: str
    text: str
    waveform_N: NDArray[np.float32]
    reference_waveform_N: NDArray[np.float32]
    """The speaker prompt, rendered by the same codec."""
    sample_rate_hz: int
    golden_duration_s: float
    """How long the person took for the same text; 0 when nobody was recorded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenAnswer:
    """A sample that was not rendered, as a reward that reads tokens gets it."""

    sample_id: str
    text: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """The stop token included, unless it is truncated."""
    is_truncated: bool


@dataclass(frozen=True, slots=True)
class Measured:
    """A judgement that succeeded."""

    value: float


@dataclass(frozen=True, slots=True)
class Unmeasured:
    """A judgement that failed; never a zero in disguise."""

    reason: str


Score: TypeAlias = Measured | Unmeasured


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredSample:
    """A sample, what each judge measured of it, and the reward made of that."""

    sample: Sample
    measures: Mapping[str, Score]
    reward: Score


class PairKind(StrEnum):
    """Where a preference comes from."""

    GOLDEN = "golden"
    """The recording against a sample: the paper's pairs."""
    RANKED = "ranked"
    """The best sample of a group against the worst."""
    VOTED = "voted"
    """The sample that people preferred to another one of its group."""
    LABELLED = "labelled"
    """One answer alone, good or bad: KTO needs no other one to compare it with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    """Two answers to one prompt, the first preferred to the second.

    A labelled answer has one side, the other is empty: a good one is chosen, a bad one rejected.
    """

    pair_id: str
    kind: PairKind
    prompt_id: str
    policy_version: int
    codec_fingerprint: str
    prompt_token_ids: tuple[int, ...]
    chosen_token_ids: tuple[int, ...]
    rejected_token_ids: tuple[int, ...]
    margin: float
    """Reward of chosen minus rejected; 1.0 for golden pairs, which nobody scored; of votes, the
    share for the chosen less the share against it; of a labelled answer, how far its reward is
    beyond the limit."""

    def __post_init__(self) -> None:
        num_sides = bool(self.chosen_token_ids) + bool(self.rejected_token_ids)
        if self.kind is PairKind.LABELLED and num_sides == 2:
            raise DataError(f"pair {self.pair_id}: a labelled answer is good or bad, not both")
        if num_sides < (1 if self.kind is PairKind.LABELLED else 2):
            raise DataError(f"pair {self.pair_id}: one side is empty")
        if self.chosen_token_ids == self.rejected_token_ids:
            raise DataError(f"pair {self.pair_id}: both sides are the same tokens")
        if not self.margin > 0:
            raise DataError(f"pair {self.pair_id}: margin {self.margin} is not positive")


class DropReason(StrEnum):
    """Why a sample or a group made no pair."""

    UNMEASURED = "unmeasured"
    TIED = "tied"
    TRUNCATED = "truncated"
    EMPTY = "empty"
    IDENTICAL = "identical"


@dataclass(frozen=True, slots=True)
class Dropped:
    """A group of samples that made no pair."""

    prompt_id: str
    reason: DropReason
