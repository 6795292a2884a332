"""The deployment that makes codes into sound and, for uploaded voices, sound into codes."""

import asyncio

import numpy as np
import torch
from numpy.typing import NDArray

from speechalign.codec.base import check_fingerprint
from speechalign.codec.build import build_codec
from speechalign.config.serving import ServingConfig
from speechalign.policy.nar import load_nar
from speechalign.serving.voices import read_clip
from speechalign.serving.windows import Heard, Window, WindowRenderer


class VoiceRenderer:
    """NAR model and codec; it keeps nothing between calls, so any replica can serve any stream."""

    def __init__(self, config: ServingConfig) -> None:
        torch.set_num_threads(config.rendering.num_threads)
        self._config = config
        self._codec = build_codec(config.codec)
        nar = load_nar(config.nar)
        check_fingerprint(self._codec.fingerprint, nar.facts["codec_fingerprint"], "the NAR model")
        levels = config.rendering.num_levels
        self._windows = WindowRenderer(self._codec, nar, levels, config.streaming)

    async def sample_rate_hz(self) -> int:
        """Return the rate of all waveforms."""
        return self._codec.sample_rate_hz

    async def render(self, window: Window) -> tuple[NDArray[np.float32], Heard]:
        """Return what can be heard now, and what was heard then."""
        return await asyncio.to_thread(self._windows.render, window)

    async def encode(self, clip: bytes) -> tuple[NDArray[np.int16], str]:
        """Return codes_KT of an uploaded clip, and the codec's fingerprint.

        Raises:
            DataError: the clip cannot be used; the message says why.
        """
        return await asyncio.to_thread(self._encode, clip)

    def _encode(self, clip: bytes) -> tuple[NDArray[np.int16], str]:
        wave_N = read_clip(clip, self._codec.sample_rate_hz, self._config.voices)
        codes_KT = self._codec.encode(wave_N).astype(np.int16)
        return codes_KT, self._codec.fingerprint
