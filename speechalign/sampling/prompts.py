"""Which texts are spoken, in which voices.

Everything here is decided on the driver, from the golden table, before an actor starts; so a
prompt that no policy can answer is known, and named, before any sampling.

Shapes: K codebooks, T frames.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from speechalign.codec.base import check_fingerprint
from speechalign.config.sampling import PromptsConfig
from speechalign.errors import DataError, UnspeakableText
from speechalign.policy.prompt_format import answer_token_ids, prompt_token_ids
from speechalign.policy.vocabulary import Vocabulary
from speechalign.rows import (
    QUARANTINE,
    codes_from_flat,
    prompts_from_table,
    prompts_to_table,
    samples_to_table,
)
from speechalign.seeds import derive_seed
from speechalign.types import Prompt, Sample

_Clip: TypeAlias = dict[str, Any]  # the cells of one row of the golden table, codes aside
_CLIP_COLUMNS = ("clip_id", "text", "speaker_id", "num_frames")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmittedPrompts:
    """Prompts that the policy can be given, and those that it cannot."""

    prompts: pa.Table
    """rows.PROMPT."""
    quarantine: pa.Table
    """rows.QUARANTINE."""


def build_prompts(golden: pa.Table, config: PromptsConfig, *, seed: int) -> list[Prompt]:
    """Choose texts, and for each another recording of its speaker as the voice to continue.

    The choice depends on the seed and the clip ids, not on the order of the rows. `prompt_id` is
    the id of the recording of the text.

    Args:
        golden: rows.GOLDEN.
        config: what to choose.
        seed: of the choice.

    Raises:
        DataError: the table has too few recordings that fit.
    """
    clips = _matching_clips(golden, config)
    voices: dict[str, list[tuple[int, _Clip]]] = {}
    for index, clip in clips:
        if clip["num_frames"] >= config.speaker_frames:
            voices.setdefault(clip["speaker_id"], []).append((index, clip))
    chosen: list[tuple[int, int, _Clip]] = []
    for index, clip in sorted(clips, key=lambda pair: _lot(seed, "text", pair[1]["clip_id"])):
        if len(chosen) == config.num_prompts:
            break
        others = [
            (other_index, other)
            for other_index, other in voices.get(clip["speaker_id"], [])
            if other["text"] != clip["text"]
        ]
        if clip["num_frames"] <= config.max_golden_frames and others:
            voice = min(others, key=lambda pair: _lot(seed, clip["clip_id"], pair[1]["clip_id"]))
            chosen.append((index, voice[0], clip))
    if len(chosen) < config.num_prompts:
        raise DataError(
            f"{config.num_prompts} prompts were asked for, but only {len(chosen)} of {len(clips)} "
            f"matching recordings have at most {config.max_golden_frames} frames and a second "
            f"recording of their speaker, of another text and at least {config.speaker_frames} "
            f"frames ({_wanted(config)}); lower num_prompts or speaker_frames, or add recordings"
        )
    return _prompts(golden, chosen, config.speaker_frames, seed)


def admit_prompts(
    prompts: Sequence[Prompt],
    vocabulary: Vocabulary,
    facts: Mapping[str, Any],
    *,
    max_prompt_tokens: int,
) -> AdmittedPrompts:
    """Separate the prompts that the policy can be given from those that it cannot.

    Args:
        prompts: to be looked at.
        vocabulary: of the policy.
        facts: of the policy.
        max_prompt_tokens: longer prompts leave no room for an answer.

    Raises:
        DataError: prompts and policy have different codecs, or nothing is left.
    """
    good: list[Prompt] = []
    bad: list[dict[str, str]] = []
    for prompt in prompts:
        check_fingerprint(prompt.codec_fingerprint, facts["codec_fingerprint"], "the AR policy")
        reason = _why_not(prompt, vocabulary, facts["prefix_frames"], max_prompt_tokens)
        if reason:
            bad.append({"stage": "prompts", "row_id": prompt.prompt_id, "reason": reason})
        else:
            good.append(prompt)
    if not good:
        reason = bad[0]["reason"] if bad else "there was none"
        raise DataError(f"none of {len(bad)} prompts can be given to the policy; first: {reason}")
    return AdmittedPrompts(
        prompts=prompts_to_table(good), quarantine=pa.Table.from_pylist(bad, schema=QUARANTINE)
    )


def golden_samples(prompts: pa.Table, vocabulary: Vocabulary) -> pa.Table:
    """Return rows.SAMPLE in which the answer to each prompt is the recording itself.

    Rendered like a sample it is the ceiling of the AR model: its tokens could not be better.
    `policy_version` is -1 and the prompt's token ids are empty: no policy made it.
    """
    read = prompts_from_table(prompts)
    samples = [_golden_sample(prompt, vocabulary) for prompt in read]
    return samples_to_table(samples, {prompt.prompt_id: prompt for prompt in read})


def _matching_clips(golden: pa.Table, config: PromptsConfig) -> list[tuple[int, _Clip]]:
    filters = (
        ("split", (config.split,)),
        ("kind", config.kinds),
        ("source", config.sources),
        ("speaker_id", config.speakers),
    )
    is_wanted = np.ones(golden.num_rows, dtype=bool)
    for column, allowed in filters:
        if allowed:
            is_wanted &= np.isin(np.asarray(golden[column].to_pylist(), str), allowed)
    indices = np.flatnonzero(is_wanted).tolist()
    clips = golden.select(list(_CLIP_COLUMNS)).take(pa.array(indices, pa.int64())).to_pylist()
    return list(zip(indices, clips, strict=True))


def _prompts(
    golden: pa.Table, chosen: list[tuple[int, int, _Clip]], speaker_frames: int, seed: int
) -> list[Prompt]:
    texts = golden.take(pa.array([index for index, _, _ in chosen], pa.int64())).to_pylist()
    voices = golden.select(["codes", "num_frames"])
    voices = voices.take(pa.array([index for _, index, _ in chosen], pa.int64())).to_pylist()
    return [
        Prompt(
            prompt_id=text["clip_id"],
            text=text["text"],
            phonemes=text["phonemes"],
            speaker_id=text["speaker_id"],
            speaker_codes_KT=_crop(voice, speaker_frames, _lot(seed, "crop", text["clip_id"])),
            golden_codes_KT=codes_from_flat(
                text["codes"], len(text["codes"]) // text["num_frames"]
            ),
            codec_fingerprint=text["codec_fingerprint"],
        )
        for text, voice in zip(texts, voices, strict=True)
    ]


def _crop(voice: _Clip, num_frames: int, lot: int) -> np.ndarray[Any, np.dtype[np.int16]]:
    codes_KT = codes_from_flat(voice["codes"], len(voice["codes"]) // voice["num_frames"])
    start = lot % (codes_KT.shape[1] - num_frames + 1)
    return np.ascontiguousarray(codes_KT[:, start : start + num_frames])


def _why_not(
    prompt: Prompt, vocabulary: Vocabulary, prefix_frames: int, max_prompt_tokens: int
) -> str:
    try:
        ids = prompt_token_ids(
            vocabulary, prompt.phonemes, prompt.speaker_codes_KT, prefix_frames=prefix_frames
        )
    except (DataError, UnspeakableText) as error:
        return str(error)
    if len(ids) > max_prompt_tokens:
        return (
            f"the prompt has {len(ids)} tokens, more than the {max_prompt_tokens} that leave "
            "room for an answer; shorten the text or raise max_model_len"
        )
    return ""


def _golden_sample(prompt: Prompt, vocabulary: Vocabulary) -> Sample:
    token_ids = answer_token_ids(vocabulary, prompt.golden_codes_KT)
    return Sample(
        prompt_id=prompt.prompt_id,
        sample_index=0,
        policy_version=-1,
        codec_fingerprint=prompt.codec_fingerprint,
        prompt_token_ids=(),
        token_ids=token_ids,
        logprobs=(0.0,) * len(token_ids),
        temperature=1.0,
        is_truncated=False,
    )


def _lot(seed: int, *parts: str) -> int:
    return derive_seed(seed, "prompts", *parts)


def _wanted(config: PromptsConfig) -> str:
    wanted = {
        "split": config.split,
        "kinds": config.kinds,
        "sources": config.sources,
        "speakers": config.speakers,
    }
    return ", ".join(f"{name} {value}" for name, value in wanted.items() if value)
