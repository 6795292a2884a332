"""The deployment that holds the engine: phonemes and a voice in, codec codes out as they come."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from speechalign.artifacts import manifest_facts
from speechalign.codec.base import check_fingerprint
from speechalign.config.serving import ServedPolicyConfig, ServingConfig
from speechalign.errors import ConfigError, EngineDead, MalformedCodes
from speechalign.generation.base import SamplingParams
from speechalign.generation.build import build_generation_engine
from speechalign.generation.streams import AnswerStreams, Piece
from speechalign.policy.ar import VOCABULARY
from speechalign.policy.prompt_format import asked_prompt
from speechalign.policy.reward_model import LoadedRewardModel, load_reward_model
from speechalign.policy.vocabulary import EOS_ID, Vocabulary
from speechalign.seeds import derive_seed
from speechalign.startup import collect_seldom


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One sentence to be spoken."""

    phonemes: str
    voice_codes_KT: NDArray[np.int16]
    codec_fingerprint: str
    seed: int
    n_best: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Spoken:
    """What was added to an answer."""

    codes_kT: NDArray[np.int16]
    """Whole frames of the AR model's levels."""
    is_last: bool
    is_truncated: bool


class PolicySpeaker:
    """One policy, in one engine; many sentences at once.

    Serve calls `reconfigure` when the application's `user_config` changes: the policy is then
    swapped in place, and no answer in the making is lost.
    """

    def __init__(self, config: ServingConfig) -> None:
        collect_seldom()
        self._config = config
        self._streams: AnswerStreams | None = None
        self._served: ServedPolicyConfig | None = None
        self._rewards: LoadedRewardModel | None = None

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Answer with the policy of a `ServedPolicyConfig` from here on.

        Raises:
            ConfigError: the folder holds no policy, or one of another shape.
            CorruptArtifact: a file differs from the manifest.
        """
        served = ServedPolicyConfig.model_validate(user_config)
        if self._streams is None:
            engine = build_generation_engine(served.path, self._config.engine)
            self._streams = AnswerStreams(engine)
        elif self._served is not None and served.path != self._served.path:
            _check_same_shape(self._served.path, served.path)
            await self._streams.load_policy(served.path)
        self._served = served
        self._facts = manifest_facts(served.path)
        self._vocabulary = Vocabulary.load(served.path / VOCABULARY)
        # A word among the codes is no sound; short texts make a policy say one now and then.
        self._allowed_ids = (EOS_ID, *self._vocabulary.code_ids)
        chooser = served.reward_model
        self._rewards = None if chooser is None else load_reward_model(chooser)

    def check_health(self) -> None:
        """Let Serve replace this replica when its engine is dead.

        Raises:
            EngineDead: it is.
        """
        if self._streams is not None and self._streams.death is not None:
            raise EngineDead(str(self._streams.death))

    async def facts(self) -> dict[str, Any]:
        """Return what people may know of the policy."""
        return {
            "version": self._facts["policy_version"],
            "codec_fingerprint": self._facts["codec_fingerprint"],
            "can_choose": self._rewards is not None,
        }

    async def speak(self, ask: Ask) -> AsyncGenerator[Spoken]:
        """Yield whole frames as they are made; the last one says so.

        Raises:
            ConfigError, DataError: the sentence or the voice does not fit the policy.
            MalformedCodes: the policy said something that is no sound.
            EngineDead: the engine will not answer again; Serve replaces it.
        """
        prompt = self._prompt(ask)
        if ask.n_best > 1:
            yield await self._best(prompt, ask)
            return
        held: list[int] = []
        levels = self._vocabulary.num_codebooks
        async for piece in self._answer(prompt, ask.seed):
            held += piece.token_ids
            if piece.is_last:
                yield self._spoken(held, piece)
            elif len(held) >= self._config.streaming.piece_tokens:
                whole = len(held) // levels * levels
                yield self._spoken(held[:whole], piece)
                held = held[whole:]

    async def _best(self, prompt: tuple[int, ...], ask: Ask) -> Spoken:
        """Return the answer that the reward model likes best; none is heard before all are made."""
        if self._rewards is None:
            raise ConfigError("this policy has no reward model, so nothing can choose")
        seeds = [derive_seed(ask.seed, "best", index) for index in range(ask.n_best)]
        answers = await asyncio.gather(*[self._whole_answer(prompt, seed) for seed in seeds])
        rewards = self._rewards.rewards([(prompt, token_ids) for token_ids, _ in answers])
        return self._spoken(*answers[int(np.argmax(rewards))])

    async def _whole_answer(self, prompt: tuple[int, ...], seed: int) -> tuple[list[int], Piece]:
        pieces = [piece async for piece in self._answer(prompt, seed)]
        return [token for piece in pieces for token in piece.token_ids], pieces[-1]

    def _answer(self, prompt: tuple[int, ...], seed: int) -> AsyncGenerator[Piece]:
        speaking = self._config.speaking
        params = SamplingParams(
            temperature=speaking.temperature,
            top_p=speaking.top_p,
            top_k=speaking.top_k,
            max_new_tokens=speaking.max_new_tokens,
            eos_id=EOS_ID,
            allowed_ids=self._allowed_ids,
        )
        assert self._streams is not None  # noqa: S101 - Serve configured it first
        return self._streams.answer(prompt, seed, params)

    def _prompt(self, ask: Ask) -> tuple[int, ...]:
        check_fingerprint(
            ask.codec_fingerprint, self._facts["codec_fingerprint"], "the policy that was asked"
        )
        return asked_prompt(self._vocabulary, self._facts, ask.phonemes, ask.voice_codes_KT)

    def _spoken(self, token_ids: Sequence[int], piece: Piece) -> Spoken:
        ids = list(token_ids)
        if ids and ids[-1] == EOS_ID:
            ids.pop()
        whole = len(ids) // self._vocabulary.num_codebooks * self._vocabulary.num_codebooks
        try:
            codes_kT = self._vocabulary.layout.unflatten(np.asarray(ids[:whole], np.int64))
        except MalformedCodes as error:
            raise MalformedCodes(f"the policy said a token that is no sound: {error}") from None
        return Spoken(
            codes_kT=codes_kT.astype(np.int16),
            is_last=piece.is_last,
            is_truncated=piece.is_truncated,
        )


def _check_same_shape(old: Path, new: Path) -> None:
    """Refuse a policy that the engine cannot load in place."""
    if not (new / VOCABULARY).is_file():
        raise ConfigError(f"{new} holds no policy; the endpoint goes on with {old}")
    facts = [manifest_facts(folder) for folder in (old, new)]
    shapes = [
        (Vocabulary.load(folder / VOCABULARY), one["prefix_frames"], one.get("knows_feedback"))
        for folder, one in zip((old, new), facts, strict=True)
    ]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"{new} has prompts of another form than {old}: it cannot be swapped in place; deploy "
            "it under a name of its own"
        )
