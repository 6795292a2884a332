"""One sentence on its way out: codes come from the speaker while earlier ones are rendered."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from speechalign.config.serving import StreamingConfig
from speechalign.serving.speaker import Ask, Spoken
from speechalign.serving.windows import Heard, Schedule, Window


class Speaker(Protocol):
    """What is asked of a policy's deployment."""

    def speak(self, ask: Ask) -> AsyncGenerator[Spoken]:
        """Yield codes as they are made; closing the iterator frees the engine's slot."""
        ...


class Renderer(Protocol):
    """What is asked of the renderer's deployment."""

    async def render(self, window: Window) -> tuple[NDArray[np.float32], Heard]:
        """Return what can be heard now, and what was heard then."""
        ...


class Sentence:
    """Begins to be spoken when it is made, so the next one is ready when this one ends."""

    def __init__(
        self, speaker: Speaker, renderer: Renderer, ask: Ask, config: StreamingConfig
    ) -> None:
        self._speaker, self._renderer, self._ask, self._config = speaker, renderer, ask, config
        self._parts: list[NDArray[np.int16]] = []
        self._last: Spoken | None = None
        self._news = asyncio.Event()
        self._task = asyncio.create_task(self._listen())

    @property
    def num_frames(self) -> int:
        """Frames that the policy has said so far."""
        return sum(part.shape[1] for part in self._parts)

    @property
    def is_truncated(self) -> bool:
        """Whether the answer hit the length cap."""
        return self._last is not None and self._last.is_truncated

    async def waves(self) -> AsyncGenerator[NDArray[np.float32]]:
        """Yield the sound as soon as it can be heard; waves_N of any length but none.

        Raises:
            TimeoutError: the speaker was silent for too long.
            Exception: what the speaker or the renderer raised.
        """
        schedule, heard = Schedule(self._config), Heard()
        while True:
            async with asyncio.timeout(self._config.piece_timeout_s):
                await self._news.wait()
            self._news.clear()
            if self._task.done():
                self._task.result()
            is_last = self._last is not None
            if not is_last and not schedule.is_due(self.num_frames):
                continue
            window = self._window(heard, is_last=is_last)
            async with asyncio.timeout(self._config.piece_timeout_s):
                wave_N, heard = await self._renderer.render(window)
            if len(wave_N):
                yield wave_N
            if is_last:
                return

    def _window(self, heard: Heard, *, is_last: bool) -> Window:
        return Window(
            codes_kT=np.concatenate(self._parts, axis=1).astype(np.int64),
            speaker_codes_KT=self._ask.voice_codes_KT,
            heard=heard,
            is_last=is_last,
        )

    async def close(self) -> None:
        """Stop speaking."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _listen(self) -> None:
        try:
            async for spoken in self._speaker.speak(self._ask):
                self._parts.append(spoken.codes_kT)
                if spoken.is_last:
                    self._last = spoken
                self._news.set()
        finally:
            self._news.set()
