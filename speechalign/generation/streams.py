"""Answers that leave the engine while they are made: many at once, one thread, one engine.

The thread is the only one that touches the engine. Who asks is an asyncio task; it gets the
tokens of each step, and closing its iterator frees the engine's slot.
"""

import asyncio
import logging
import queue
import threading
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from speechalign.errors import ConfigError, DataError, EngineDead, SpeechalignError
from speechalign.generation.base import SamplingParams

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one step added to an answer."""

    answer_id: str
    token_ids: tuple[int, ...]
    is_last: bool
    is_truncated: bool = False
    """Of the last piece: whether the answer hit the length cap."""


class SteppingEngine(Protocol):
    """An engine that is driven step by step; not safe to call from two threads."""

    @property
    def policy_version(self) -> int:
        """Of the weights that answer now."""
        ...

    def load_policy(self, folder: Path) -> None:
        """Replace the weights in place; only while no answer is being made."""
        ...

    def add(
        self, answer_id: str, prompt_token_ids: Sequence[int], seed: int, params: SamplingParams
    ) -> None:
        """Begin an answer.

        Raises:
            ConfigError: the prompt and the length cap together exceed the model's length.
        """
        ...

    def step(self) -> list[Piece]:
        """Give every answer in the making its next tokens; finished ones are forgotten.

        Raises:
            EngineDead: the engine will not answer again.
        """
        ...

    def abort(self, answer_ids: Sequence[str]) -> None:
        """Forget answers."""
        ...


@dataclass(slots=True)
class _Listener:
    """An answer that somebody waits for."""

    answer_id: str
    prompt_token_ids: Sequence[int]
    seed: int
    params: SamplingParams
    loop: asyncio.AbstractEventLoop
    pieces: asyncio.Queue[Piece | Exception] = field(
        default_factory=asyncio.Queue[Piece | Exception]
    )
    is_gone: bool = False

    def tell(self, piece: Piece | Exception) -> None:
        """Hand something over to the waiting task; called by the engine's thread."""
        try:
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)
        except RuntimeError:  # the loop was closed: nobody waits any more
            self.is_gone = True


@dataclass(frozen=True, slots=True)
class _Swap:
    """Another policy that shall answer from here on."""

    folder: Path
    done: "Future[int]"


class AnswerStreams:
    """Continuous batching for asyncio.

    A policy is swapped between answers: those in the making are finished by the policy that
    began them, later ones wait.
    """

    def __init__(self, engine: SteppingEngine) -> None:
        self._engine = engine
        self._inbox: queue.SimpleQueue[_Listener | _Swap | None] = queue.SimpleQueue()
        self._waiting: deque[_Listener | _Swap] = deque()
        self._speaking: dict[str, _Listener] = {}
        self._death: SpeechalignError | None = None
        self._count = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def policy_version(self) -> int:
        """Of the weights that answer now."""
        return self._engine.policy_version

    @property
    def death(self) -> SpeechalignError | None:
        """Why nothing will be answered any more, if that is so."""
        return self._death

    async def answer(
        self, prompt_token_ids: Sequence[int], seed: int, params: SamplingParams
    ) -> AsyncGenerator[Piece]:
        """Yield the pieces of an answer as they are made.

        Raises:
            ConfigError: the prompt and the length cap together exceed the model's length.
            EngineDead: the engine will not answer again.
        """
        self._count += 1
        listener = _Listener(
            f"a{self._count}", prompt_token_ids, seed, params, asyncio.get_running_loop()
        )
        self._order(listener)
        try:
            while True:
                piece = await listener.pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if piece.is_last:
                    return
        finally:
            listener.is_gone = True

    async def load_policy(self, folder: Path) -> int:
        """Swap the policy as soon as the answers in the making are finished; return its version.

        Raises:
            ConfigError, CorruptArtifact: the folder holds no such policy; the old one stays.
            EngineDead: the engine will not answer again.
        """
        done: Future[int] = Future()
        self._order(_Swap(folder, done))
        return await asyncio.wrap_future(done)

    def close(self) -> None:
        """End the thread; what is still waited for fails."""
        self._inbox.put(None)
        self._thread.join()

    def _order(self, order: _Listener | _Swap) -> None:
        """Hand an order to the thread; asked afterwards, since `_end` may just have been through.

        Raises:
            EngineDead: nobody will take it.
        """
        self._inbox.put(order)
        if self._death is not None:
            raise EngineDead(str(self._death))

    def _run(self) -> None:
        # Gives this thread's OpenMP the process's number of threads; else vLLM, which asks
        # OpenMP before torch has told it, plans its attention for another number and aborts.
        torch.get_num_threads()
        try:
            while self._take_orders():
                self._step()
        except EngineDead as error:
            self._end(error)
        except Exception as error:  # a thread that ends in silence leaves all waiting
            logger.exception("the engine's thread failed")
            self._end(EngineDead(f"the engine failed: {type(error).__name__}: {error}"))
        else:
            self._end(EngineDead("the engine was closed"))

    def _take_orders(self) -> bool:
        """Return whether to go on; sleeps while there is nothing to do."""
        is_idle = not self._speaking and not self._waiting
        try:
            while True:
                order = self._inbox.get(block=is_idle)
                if order is None:
                    return False
                self._waiting.append(order)
                is_idle = False
        except queue.Empty:
            pass
        while self._waiting and not (isinstance(self._waiting[0], _Swap) and self._speaking):
            order = self._waiting.popleft()
            if isinstance(order, _Swap):
                self._swap(order)
            elif not order.is_gone:
                self._begin(order)
        return True

    def _begin(self, listener: _Listener) -> None:
        try:
            self._engine.add(
                listener.answer_id, listener.prompt_token_ids, listener.seed, listener.params
            )
        except ConfigError as error:
            listener.tell(error)
        else:
            self._speaking[listener.answer_id] = listener

    def _swap(self, swap: _Swap) -> None:
        # A cancelled future takes no result: to set one would end the thread.
        if not swap.done.set_running_or_notify_cancel():
            return
        try:
            self._engine.load_policy(swap.folder)
        except (ConfigError, DataError, OSError) as error:  # the old policy stays: tell who asked
            swap.done.set_exception(error)
        except Exception as error:  # its weights may be half replaced
            dead = EngineDead(f"loading {swap.folder} failed: {type(error).__name__}: {error}")
            swap.done.set_exception(dead)
            raise dead from error
        else:
            swap.done.set_result(self._engine.policy_version)

    def _step(self) -> None:
        gone = [answer_id for answer_id, one in self._speaking.items() if one.is_gone]
        if gone:
            self._engine.abort(gone)
            for answer_id in gone:
                del self._speaking[answer_id]
        if not self._speaking:
            return
        for piece in self._engine.step():
            listener = self._speaking.get(piece.answer_id)
            if listener is not None:
                listener.tell(piece)
            if piece.is_last:
                self._speaking.pop(piece.answer_id, None)

    def _end(self, error: EngineDead) -> None:
        self._death = error
        orders = [*self._waiting, *self._speaking.values()]
        while not self._inbox.empty():
            order = self._inbox.get()
            if order is not None:
                orders.append(order)
        for order in orders:
            if not isinstance(order, _Swap):
                order.tell(EngineDead(str(error)))
            elif order.done.set_running_or_notify_cancel():
                order.done.set_exception(EngineDead(str(error)))
