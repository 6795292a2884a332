"""Many answers from one engine's thread: order, ends, swaps, deaths."""

import asyncio
import queue
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from speechalign.config.sampling import TransformersConfig
from speechalign.errors import ConfigError, EngineDead
from speechalign.generation.base import GenerationRequest, SamplingParams
from speechalign.generation.hf import TransformersEngine
from speechalign.generation.streams import AnswerStreams, Piece
from tests.tiny_stack import build_tiny_stack

PARAMS = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=3, eos_id=1)


class ScriptedEngine:
    """Says 10, 11, 12 ... to everybody; each step waits for permission."""

    def __init__(self, *, is_free: bool = True) -> None:
        self.policy_version = 0
        self.said: dict[str, int] = {}
        self.aborted: list[str] = []
        self.versions: list[int] = []
        self.most_at_once = 0
        self.is_stepping, self.may_step = threading.Event(), threading.Event()
        self.dies = self.fails = False
        if is_free:
            self.may_step.set()

    def load_policy(self, folder: Path) -> None:
        if folder.name == "broken":
            raise ConfigError("no policy here")
        if folder.name == "of another shape":
            raise KeyError("layers.6.weight")
        assert not self.said, "a policy was swapped while an answer was being made"
        self.policy_version = int(folder.name)

    def add(
        self, answer_id: str, prompt_token_ids: Sequence[int], seed: int, params: SamplingParams
    ) -> None:
        if len(prompt_token_ids) > 4:
            raise ConfigError("too long")
        self.said[answer_id] = 0

    def step(self) -> list[Piece]:
        self.is_stepping.set()
        self.may_step.wait(10)
        self.most_at_once = max(self.most_at_once, len(self.said))
        if self.dies:
            raise EngineDead("burnt out")
        if self.fails:
            raise ValueError("a bug")
        pieces: list[Piece] = []
        for answer_id in list(self.said):
            self.said[answer_id] += 1
            count = self.said[answer_id]
            is_last = count == PARAMS.max_new_tokens
            pieces.append(Piece(answer_id=answer_id, token_ids=(9 + count,), is_last=is_last))
            if is_last:
                del self.said[answer_id]
                self.versions.append(self.policy_version)
        return pieces

    def abort(self, answer_ids: Sequence[str]) -> None:
        self.aborted += answer_ids
        for answer_id in answer_ids:
            del self.said[answer_id]


async def begun(engine: ScriptedEngine) -> None:
    """Return when the engine makes an answer."""
    assert await asyncio.to_thread(engine.is_stepping.wait, 10)


async def tokens_of(streams: AnswerStreams, prompt: Sequence[int] = (1,)) -> list[int]:
    return [t async for piece in streams.answer(prompt, 0, PARAMS) for t in piece.token_ids]


def test_answers_are_made_side_by_side_and_each_hears_its_own_pieces():
    engine = ScriptedEngine(is_free=False)
    streams = AnswerStreams(engine)

    async def run() -> list[list[int]]:
        answers = [asyncio.create_task(tokens_of(streams)) for _ in range(3)]
        await begun(engine)
        engine.may_step.set()
        return await asyncio.gather(*answers)

    assert asyncio.run(run()) == [[10, 11, 12]] * 3
    assert engine.most_at_once == 3
    streams.close()


def test_an_answer_that_nobody_hears_any_more_is_aborted():
    engine = ScriptedEngine()
    streams = AnswerStreams(engine)

    async def run() -> None:
        answer = streams.answer((1,), 0, PARAMS)
        engine.may_step.clear()
        first = asyncio.create_task(anext(answer))
        await begun(engine)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        engine.may_step.set()
        await tokens_of(streams)

    asyncio.run(run())
    streams.close()
    assert engine.aborted == ["a1"]
    assert engine.said == {}


def test_a_swap_waits_for_the_answers_in_the_making_and_later_ones_wait_for_it():
    engine = ScriptedEngine(is_free=False)
    streams = AnswerStreams(engine)

    async def run() -> int:
        early = asyncio.create_task(tokens_of(streams))
        await begun(engine)
        swap = asyncio.create_task(streams.load_policy(Path("7")))
        await asyncio.sleep(0)
        late = asyncio.create_task(tokens_of(streams))
        await asyncio.sleep(0)
        engine.may_step.set()
        await asyncio.gather(early, late)
        return await swap

    assert asyncio.run(run()) == 7
    assert engine.versions == [0, 7]
    streams.close()


def test_a_swap_to_no_policy_is_an_error_for_who_asked_and_nobody_else():
    engine = ScriptedEngine()
    streams = AnswerStreams(engine)

    async def run() -> list[int]:
        with pytest.raises(ConfigError, match="no policy here"):
            await streams.load_policy(Path("broken"))
        return await tokens_of(streams)

    assert asyncio.run(run()) == [10, 11, 12]
    streams.close()


def test_a_prompt_that_does_not_fit_fails_alone():
    streams = AnswerStreams(ScriptedEngine())

    async def run() -> tuple[object, object]:
        return await asyncio.gather(
            tokens_of(streams, (1,) * 9), tokens_of(streams), return_exceptions=True
        )

    too_long, fine = asyncio.run(run())
    assert isinstance(too_long, ConfigError)
    assert fine == [10, 11, 12]
    streams.close()


def test_when_the_engine_dies_everybody_who_waits_is_told_and_later_ones_at_once():
    engine = ScriptedEngine(is_free=False)
    streams = AnswerStreams(engine)

    async def run() -> list[object]:
        answers = [asyncio.create_task(tokens_of(streams)) for _ in range(2)]
        await begun(engine)
        swap = asyncio.create_task(streams.load_policy(Path("1")))
        await asyncio.sleep(0)
        engine.dies = True
        engine.may_step.set()
        told = await asyncio.gather(*answers, return_exceptions=True)
        (swapped,) = await asyncio.gather(swap, return_exceptions=True)
        (late,) = await asyncio.gather(tokens_of(streams), return_exceptions=True)
        return [*told, swapped, late]

    assert [type(error) for error in asyncio.run(run())] == [EngineDead] * 4
    assert str(streams.death) == "burnt out"


def test_an_order_that_comes_just_after_the_end_is_told_too(monkeypatch: pytest.MonkeyPatch):
    class LateInbox(queue.SimpleQueue[Any]):
        """Lets an order in when the thread has ended."""

        def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
            if item is not None:
                streams.close()
            super().put(item, block, timeout)

    module = SimpleNamespace(SimpleQueue=LateInbox, Empty=queue.Empty)
    monkeypatch.setattr("speechalign.generation.streams.queue", module)

    async def load() -> int:
        return await asyncio.wait_for(streams.load_policy(Path("1")), 10)

    async def speak() -> list[int]:
        return await asyncio.wait_for(tokens_of(streams), 10)

    for order in (load, speak):
        streams = AnswerStreams(ScriptedEngine())
        with pytest.raises(EngineDead, match="the engine was closed"):
            asyncio.run(order())


def test_a_swap_that_nobody_waits_for_any_more_is_left_out_and_the_engine_lives():
    engine = ScriptedEngine(is_free=False)
    streams = AnswerStreams(engine)

    async def run() -> list[list[int]]:
        early = asyncio.create_task(tokens_of(streams))
        await begun(engine)
        await cancelled_swap(streams)
        engine.may_step.set()
        return [await early, await tokens_of(streams)]

    assert asyncio.run(run()) == [[10, 11, 12]] * 2
    assert engine.policy_version == 0
    streams.close()


def test_a_swap_that_nobody_waits_for_keeps_no_end_from_being_told():
    engine = ScriptedEngine(is_free=False)
    streams = AnswerStreams(engine)

    async def run() -> list[int]:
        early = asyncio.create_task(tokens_of(streams))
        await begun(engine)
        await cancelled_swap(streams)
        late = asyncio.create_task(tokens_of(streams))
        await asyncio.sleep(0)
        engine.dies = True
        engine.may_step.set()
        with pytest.raises(EngineDead, match="burnt out"):
            await early
        return await asyncio.wait_for(late, 10)

    with pytest.raises(EngineDead, match="burnt out"):
        asyncio.run(run())


async def cancelled_swap(streams: AnswerStreams) -> None:
    swap = asyncio.create_task(streams.load_policy(Path("7")))
    await asyncio.sleep(0)
    swap.cancel()
    await asyncio.gather(swap, return_exceptions=True)


def test_a_failure_that_nobody_foresaw_ends_the_engine_and_not_in_silence():
    engine = ScriptedEngine()
    engine.fails = True
    streams = AnswerStreams(engine)
    with pytest.raises(EngineDead, match="ValueError: a bug"):
        asyncio.run(tokens_of(streams))
    assert str(streams.death) == "the engine failed: ValueError: a bug"


def test_a_swap_that_broke_the_weights_ends_the_engine():
    streams = AnswerStreams(ScriptedEngine())
    with pytest.raises(EngineDead, match=r"of another shape failed: KeyError: 'layers\.6"):
        asyncio.run(streams.load_policy(Path("of another shape")))
    with pytest.raises(EngineDead):
        asyncio.run(tokens_of(streams))
    assert "KeyError" in str(streams.death)


def test_stepping_gives_the_same_answers_as_whole_batches(tmp_path: Path):
    stack = build_tiny_stack(tmp_path)
    engine = TransformersEngine(stack.ar, TransformersConfig(max_model_len=64))
    params = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=12, eos_id=1)
    prompts = [(2, 9, 10, 3, 25, 4), (2, 11, 3, 25, 26, 4)]
    requests = [GenerationRequest(prompt_token_ids=p, seeds=(5,)) for p in prompts]
    whole = [group[0] for group in engine.generate(requests, params)]
    streams = AnswerStreams(engine)

    async def run() -> list[tuple[list[int], bool]]:
        async def one(prompt: tuple[int, ...]) -> tuple[list[int], bool]:
            pieces = [piece async for piece in streams.answer(prompt, 5, params)]
            return [t for piece in pieces for t in piece.token_ids], pieces[-1].is_truncated

        return await asyncio.gather(*map(one, prompts))

    assert asyncio.run(run()) == [(list(one.token_ids), one.is_truncated) for one in whole]
    streams.close()
