"""Small builders: a test names only what it is about."""

from dataclasses import replace

import numpy as np

from speechalign.types import PairKind, PreferencePair, Prompt, Sample


def a_prompt(*, prompt_id: str = "p0", num_frames: int = 4, num_codebooks: int = 2) -> Prompt:
    frames = np.arange(num_codebooks * num_frames, dtype=np.int16)
    return Prompt(
        prompt_id=prompt_id,
        text="the dog slept",
        phonemes="dɔɡ",  # noqa: RUF001 - the letter of the IPA
        speaker_id="s0",
        speaker_codes_KT=frames.reshape(num_codebooks, num_frames),
        golden_codes_KT=frames[::-1].reshape(num_codebooks, num_frames),
        codec_fingerprint="f",
    )


def a_sample(*, prompt_id: str = "p0", index: int = 0, num_tokens: int = 4) -> Sample:
    return Sample(
        prompt_id=prompt_id,
        sample_index=index,
        policy_version=0,
        codec_fingerprint="f",
        prompt_token_ids=(2, 3, 4),
        token_ids=tuple(range(8, 8 + num_tokens)),
        logprobs=(-0.5,) * num_tokens,
        temperature=1.0,
        is_truncated=False,
    )


def some_pairs(
    count: int, *, chosen: tuple[int, int] = (8, 24), rejected: tuple[int, int] = (8, 24)
) -> list[PreferencePair]:
    """Return pairs of random answers; each side draws its tokens from a range of its own."""
    rng = np.random.default_rng(0)
    return [
        PreferencePair(
            pair_id=f"p{index}",
            kind=PairKind.RANKED,
            prompt_id=f"p{index}",
            policy_version=0,
            codec_fingerprint="f",
            prompt_token_ids=(2, 8, 9, 3, 25, 4),
            chosen_token_ids=(*rng.integers(*chosen, rng.integers(2, 9)).tolist(), 1),
            rejected_token_ids=(*rng.integers(*rejected, rng.integers(2, 9)).tolist(), 1),
            margin=1.0,
        )
        for index in range(count)
    ]


def some_labelled_answers(
    count: int, *, chosen: tuple[int, int] = (8, 24), rejected: tuple[int, int] = (8, 24)
) -> list[PreferencePair]:
    """Return answers to one prompt each: a good one, two bad ones, a good one, two bad ones, ..."""
    pairs = some_pairs(count, chosen=chosen, rejected=rejected)
    return [
        replace(
            pair,
            kind=PairKind.LABELLED,
            chosen_token_ids=() if index % 3 else pair.chosen_token_ids,
            rejected_token_ids=pair.rejected_token_ids if index % 3 else (),
        )
        for index, pair in enumerate(pairs)
    ]
