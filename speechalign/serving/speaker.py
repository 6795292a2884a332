"""The deployment that holds the engine: phonemes and a voice in, codec codes out as they come."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from speechalign.artifacts import is_committed, manifest_facts
from speechalign.codec.base import check_fingerprint
from speechalign.config.serving import ServedPolicyConfig, ServingConfig
from speechalign.errors import ConfigError, DataError, EngineDead, MalformedCodes
from speechalign.generation.base import SamplingParams
from speechalign.generation.build import build_generation_engine
from speechalign.generation.streams import AnswerStreams, Piece
from speechalign.policy.ar import VOCABULARY
from speechalign.policy.prompt_format import asked_prompt
from speechalign.policy.reward_model import LoadedRewardModel, load_reward_model
from speechalign.policy.vocabulary import EOS_ID, Vocabulary
from speechalign.seeds import derive_seed
from speechalign.serving.memory import Memory
from speechalign.startup import collect_seldom

logger = logging.getLogger(__name__)

MODEL_CONFIG = "config.json"
NOT_OF_THE_SHAPE = frozenset({"_name_or_path", "dtype", "torch_dtype", "transformers_version"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One sentence to be spoken."""

    phonemes: str
    voice_codes_KT: NDArray[np.int16]
    codec_fingerprint: str
    seed: int
    n_best: int = 1
    version: int | None = None
    """Of the policy that must speak; none: the one that is there."""


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

    def __init__(self, config: ServingConfig, memory: Memory | None = None) -> None:
        collect_seldom()
        self._config, self._memory = config, memory
        self._streams: AnswerStreams | None = None
        self._served: ServedPolicyConfig | None = None
        self._rewards: LoadedRewardModel | None = None
        self._refused = ""

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Answer with the policy of a `ServedPolicyConfig` from here on.

        A policy that cannot take the place of the one that answers is refused: `facts` and the
        log say why. Serve would end a replica that raises here, and its successors after it.
        They too are given what was refused; they answer with what the replicas before them did.

        Raises:
            ConfigError: the folder holds no policy, and there is no former one to go on with.
            CorruptArtifact: a file of it differs from the manifest.
            DataError: its reward model was trained on another codec.
            EngineDead: the engine broke while it loaded; Serve replaces the replica.
        """
        try:
            served = ServedPolicyConfig.model_validate(user_config)
            await self._take(served)
        except (ConfigError, DataError, OSError, ValidationError) as error:
            former = self._former()
            if former is None:
                raise
            if self._served is None:
                await self._take(former)
            self._refused = f"{user_config.get('path')} was refused: {error}"
            logger.warning("%s; %s goes on", self._refused, former.path)
        else:
            self._refused = ""
            if self._memory is not None:
                self._memory.keep(served)

    def _former(self) -> ServedPolicyConfig | None:
        """Return what answers, or answered before this replica started and is still there."""
        if self._served is not None or self._memory is None:
            return self._served
        kept = self._memory.recall()
        return kept if kept is not None and is_committed(kept.path) else None

    async def _take(self, served: ServedPolicyConfig) -> None:
        former = self._former()
        if former is not None and served.path != former.path:
            _check_same_shape(former.path, served.path)
        rewards = None
        if served.reward_model is not None:
            fingerprint = manifest_facts(served.path)["codec_fingerprint"]
            rewards = load_reward_model(served.reward_model, codec_fingerprint=fingerprint)
        if self._streams is None:
            engine = build_generation_engine(served.path, self._config.engine)
            self._streams = AnswerStreams(engine)
        elif self._served is None or served.path != self._served.path:
            await self._streams.load_policy(served.path)
        self._served, self._rewards = served, rewards
        self._facts = manifest_facts(served.path)
        self._vocabulary = Vocabulary.load(served.path / VOCABULARY)
        # A word among the codes is no sound; short texts make a policy say one now and then.
        self._allowed_ids = (EOS_ID, *self._vocabulary.code_ids)

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
            "refused": self._refused,
            "max_phonemes": self._max_phonemes(),
        }

    def _max_phonemes(self) -> int:
        """Return how many a sentence may have, so that prompt and answer fit the engine."""
        shape = (self._vocabulary.num_codebooks, self._facts["prefix_frames"])
        symbol, voice_kT = self._vocabulary.symbols[-1], np.zeros(shape, np.int16)
        shortest = asked_prompt(self._vocabulary, self._facts, symbol, voice_kT)
        room = self._config.engine.max_model_len - self._config.speaking.max_new_tokens
        return room - len(shortest) + 1

    async def speak(self, ask: Ask) -> AsyncGenerator[Spoken]:
        """Yield whole frames as they are made; the last one says so.

        Raises:
            ConfigError, DataError: the sentence or the voice does not fit the policy, or it is
                no longer the version that was asked for.
            MalformedCodes: the policy said something that is no sound.
            EngineDead: the engine will not answer again; Serve replaces it.
        """
        prompt = self._prompt(ask)
        if ask.n_best > 1:
            spoken = await self._best(prompt, ask)
            self._check_version(ask)
            yield spoken
            return
        held: list[int] = []
        levels = self._vocabulary.num_codebooks
        async for piece in self._answer(prompt, ask.seed):
            self._check_version(ask)
            held += piece.token_ids
            if piece.is_last:
                yield self._spoken(held, piece)
            elif len(held) >= self._config.streaming.piece_tokens:
                whole = len(held) // levels * levels
                yield self._spoken(held[:whole], piece)
                held = held[whole:]

    def _check_version(self, ask: Ask) -> None:
        """No swap comes between the tokens of an answer, so who speaks now has spoken all of it."""
        assert self._streams is not None  # noqa: S101 - Serve configured it first
        if ask.version not in (None, self._streams.policy_version):
            raise ConfigError(f"version {ask.version} was asked for, and has been replaced")

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
        (
            Vocabulary.load(folder / VOCABULARY),
            *(one.get(key) for key in ("prefix_frames", "knows_feedback", "codec_fingerprint")),
            _model_shape(folder),
        )
        for folder, one in zip((old, new), facts, strict=True)
    ]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"{new} has another model, codec or form of prompts than {old}: it cannot be swapped "
            "in place; deploy it under a name of its own"
        )


def _model_shape(folder: Path) -> dict[str, Any]:
    """Return what of a model's config its weights must fit."""
    values = json.loads((folder / MODEL_CONFIG).read_text())
    return {name: value for name, value in values.items() if name not in NOT_OF_THE_SHAPE}
