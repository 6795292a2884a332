"""Answers to sound: the NAR model fills the codec levels that an answer lacks, the codec speaks.

Shapes: K codebooks of the codec, k levels that are decoded, T frames, N samples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from speechalign.codec.base import Codec
from speechalign.config.sampling import RenderingConfig
from speechalign.errors import ConfigError, MalformedCodes, SpeechalignError
from speechalign.policy.nar import LevelFiller
from speechalign.policy.prompt_format import answer_codes
from speechalign.policy.vocabulary import Vocabulary
from speechalign.rows import NOT_RENDERED


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What of a sample is heard."""

    token_ids: tuple[int, ...]
    speaker_codes_KT: NDArray[np.int16]
    golden_codes_KT: NDArray[np.int16]


@dataclass(frozen=True, slots=True)
class Sound:
    """A decoded waveform, or why there is none."""

    waveform_N: NDArray[np.float32]
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """The sound of an answer and of the voice it should have."""

    waveform_N: NDArray[np.float32]
    reference_N: NDArray[np.float32]
    error: str
    """Why one of them could not be made; the row must then not be judged."""


SILENCE_N = np.zeros(0, np.float32)


class Renderer:
    """Renders batches of answers; a bad one never takes the others with it.

    An answer without a frame, or with a token that is no code, is the policy's own failure: it
    gets an empty waveform and no error, so that the judges hear that nothing was said. Anything
    else that fails is an error of ours.
    """

    def __init__(
        self, codec: Codec, vocabulary: Vocabulary, filler: LevelFiller, config: RenderingConfig
    ) -> None:
        if config.num_levels > codec.num_codebooks:
            raise ConfigError(
                f"rendering.num_levels {config.num_levels} exceeds the {codec.num_codebooks} "
                f"codebooks of the codec {codec.name}; lower it"
            )
        if 1 < vocabulary.num_codebooks < config.num_levels:
            raise ConfigError(
                f"the AR policy predicts {vocabulary.num_codebooks} levels, but the NAR model "
                f"starts from level 1 alone; set rendering.num_levels to {vocabulary.num_codebooks}"
            )
        self._codec = codec
        self._vocabulary = vocabulary
        self._filler = filler
        self._config = config
        self._voice = lru_cache(maxsize=config.speaker_cache_size)(self._decode_voice)

    def render(self, answers: Sequence[Answer]) -> list[Rendered]:
        """Return the sound of each answer, in order."""
        voices = [self._voice_of(answer) for answer in answers]
        codes = [self._codes(answer) for answer in answers]
        spoken = [
            index
            for index, (codes_KT, voice) in enumerate(zip(codes, voices, strict=True))
            if codes_KT.shape[1] and not voice.error
        ]
        sounds = [Sound(SILENCE_N)] * len(answers)
        filled = self._fill([codes[i] for i in spoken], [answers[i] for i in spoken])
        for index, codes_KT in zip(spoken, filled, strict=True):
            sounds[index] = self._decode(codes_KT)
        return [
            Rendered(
                waveform_N=sound.waveform_N,
                reference_N=voice.waveform_N,
                error=sound.error or voice.error,
            )
            for sound, voice in zip(sounds, voices, strict=True)
        ]

    def _codes(self, answer: Answer) -> NDArray[np.int64]:
        if self._config.source == "recording":
            return answer.golden_codes_KT.astype(np.int64)
        try:
            return answer_codes(self._vocabulary, answer.token_ids)
        except MalformedCodes:
            return np.zeros((self._vocabulary.num_codebooks, 0), np.int64)

    def _fill(
        self, codes: Sequence[NDArray[np.int64]], answers: Sequence[Answer]
    ) -> list[NDArray[np.int64]]:
        levels = self._config.num_levels
        if not codes or len(codes[0]) >= levels:
            return [codes_KT[:levels] for codes_KT in codes]
        level1s = [codes_KT[0] for codes_KT in codes]
        return self._filler.fill(level1s, [a.speaker_codes_KT for a in answers], levels)

    def _voice_of(self, answer: Answer) -> Sound:
        codes_KT = answer.speaker_codes_KT
        return _sound_of(lambda: self._voice(codes_KT.tobytes(), len(codes_KT)))

    def _decode_voice(self, codes: bytes, num_codebooks: int) -> NDArray[np.float32]:
        """Decode, or raise: only what went well is kept for the next answer of this voice."""
        codes_KT = np.frombuffer(codes, np.int16).reshape(num_codebooks, -1)
        return self._codec.decode(codes_KT.astype(np.int64))

    def _decode(self, codes_KT: NDArray[np.integer]) -> Sound:
        return _sound_of(lambda: self._codec.decode(codes_KT.astype(np.int64)))


def _sound_of(decode: Callable[[], NDArray[np.float32]]) -> Sound:
    try:
        return Sound(decode())
    except (SpeechalignError, ValueError, RuntimeError) as error:
        return Sound(SILENCE_N, f"{NOT_RENDERED}{error}")
