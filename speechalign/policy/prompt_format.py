"""How a prompt and its answer are written in token ids: the one place that knows.

    SPEAKER  codes of the voice to continue  TEXT  phonemes  SPEECH | codes of the answer  EOS
                                                    the prompt ends here | the answer

A policy of chain of hindsight (Liu et al. 2023) was trained on prompts that begin with GOOD or
BAD, as the answer was judged; asked to speak, it is told GOOD.

Shapes: K codebooks, T frames, S flat token ids.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from speechalign.errors import DataError
from speechalign.policy.vocabulary import (
    BAD_ID,
    EOS_ID,
    GOOD_ID,
    SPEAKER_ID,
    SPEECH_ID,
    TEXT_ID,
    Vocabulary,
)


def prompt_token_ids(
    vocabulary: Vocabulary,
    phonemes: str,
    speaker_codes_KT: NDArray[np.integer],
    *,
    prefix_frames: int,
) -> tuple[int, ...]:
    """Return the ids of a prompt.

    Args:
        vocabulary: of the policy.
        phonemes: the text in the policy's symbols.
        speaker_codes_KT: golden codes of another recording of the speaker; only the AR levels
            of the first `prefix_frames` frames are used.
        prefix_frames: how much of the voice the policy is used to.

    Raises:
        DataError: the recording is shorter than the prefix.
        UnspeakableText: the text has a character without a symbol.
    """
    num_frames = speaker_codes_KT.shape[1]
    if num_frames < prefix_frames:
        raise DataError(
            f"the speaker prompt has {num_frames} frames, the policy wants {prefix_frames}; "
            "choose a longer recording of the speaker"
        )
    prefix_KT = speaker_codes_KT[: vocabulary.num_codebooks, :prefix_frames]
    voice_S = vocabulary.layout.flatten(prefix_KT.astype(np.int64))
    text = vocabulary.encode_text(phonemes)
    return (SPEAKER_ID, *voice_S.tolist(), TEXT_ID, *text, SPEECH_ID)


def asked_prompt(
    vocabulary: Vocabulary,
    facts: Mapping[str, Any],
    phonemes: str,
    speaker_codes_KT: NDArray[np.integer],
) -> tuple[int, ...]:
    """Return the ids with which a policy is asked to speak, as its manifest's facts want them.

    Raises:
        DataError: the recording is shorter than the prefix.
        UnspeakableText: the text has a character without a symbol.
    """
    ids = prompt_token_ids(
        vocabulary, phonemes, speaker_codes_KT, prefix_frames=facts["prefix_frames"]
    )
    return with_feedback(ids, is_good=True) if facts.get("knows_feedback") else ids


def with_feedback(prompt_token_ids: Sequence[int], *, is_good: bool) -> tuple[int, ...]:
    """Return a prompt that says how good its answer is; what it said before is dropped."""
    return (GOOD_ID if is_good else BAD_ID, *without_feedback(prompt_token_ids))


def without_feedback(prompt_token_ids: Sequence[int]) -> tuple[int, ...]:
    """Return a prompt that says nothing of its answer."""
    says = prompt_token_ids[0] in (GOOD_ID, BAD_ID)
    return tuple(prompt_token_ids[1:] if says else prompt_token_ids)


def answer_token_ids(vocabulary: Vocabulary, codes_KT: NDArray[np.integer]) -> tuple[int, ...]:
    """Return the ids of an answer, its stop token included; deeper levels are left out."""
    levels_KT = codes_KT[: vocabulary.num_codebooks].astype(np.int64)
    return (*vocabulary.layout.flatten(levels_KT).tolist(), EOS_ID)


def answer_codes(vocabulary: Vocabulary, token_ids: Sequence[int]) -> NDArray[np.int64]:
    """Return codes_KT of an answer, without the stop token.

    An answer without one was cut off by the length cap, and so may its last frame be: that goes.

    Raises:
        MalformedCodes: an id is no code of its level, or the policy stopped within a frame.
    """
    ids = list(token_ids)
    if ids and ids[-1] == EOS_ID:
        ids.pop()
    else:
        ids = ids[: len(ids) // vocabulary.num_codebooks * vocabulary.num_codebooks]
    return vocabulary.layout.unflatten(np.asarray(ids, dtype=np.int64))
