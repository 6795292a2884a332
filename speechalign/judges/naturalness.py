"""How natural it sounds: two predictors of mean opinion scores, unlike each other."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from speechalign.audio.torchaudio_stand_in import torchaudio_for_import
from speechalign.config.judges import DistillMosConfig, DnsMosConfig
from speechalign.judges.base import Judgement, is_audible
from speechalign.judges.whisper import SAMPLE_RATE_HZ, at_16_khz
from speechalign.types import Clip, Unmeasured

logger = logging.getLogger(__name__)

SHORTEST_CLIP_S = 0.4
DNSMOS_WINDOW = 144_160
"""Samples that DNSMOS hears at once: 9.01 s at 16 kHz."""


class DistillMos:
    """DistillMOS (Stahl and Gamper 2025): one score a clip, no reference."""

    name = "distillmos"
    measures = ("distillmos",)
    remarks = ()

    def __init__(self, config: DistillMosConfig) -> None:
        with torchaudio_for_import():
            import distillmos
        import torch

        torch.set_num_threads(config.num_threads)
        self._torch = torch
        self._in_bf16 = config.dtype == "bf16" and _computes_in_bf16(torch)
        self._model = distillmos.ConvTransformerSQAModel().eval()

    def judge(self, clips: Sequence[Clip]) -> list[Judgement]:
        """Return scores, one clip at a time: padding in a batch would be heard."""
        return [self._judge(clip) for clip in clips]

    def _judge(self, clip: Clip) -> Judgement:
        if not _is_long_enough(clip):
            return Unmeasured(f"distillmos: shorter than {SHORTEST_CLIP_S} s, or silent")
        torch = self._torch
        with (
            torch.inference_mode(),
            torch.autocast("cpu", torch.bfloat16, enabled=self._in_bf16),
        ):
            wave_1N = torch.from_numpy(np.array(at_16_khz(clip)))[None]
            return {"distillmos": float(self._model(wave_1N))}


class DnsMos:
    """DNSMOS P.835 overall (Reddy et al. 2022): made for noise, a second opinion here.

    It hears windows of 9.01 s, a second apart; what is shorter is repeated until one is full.
    The package doubles the clip instead: 2 s become 16 and eight windows of the same sound.
    """

    name = "dnsmos"
    measures = ("dnsmos",)
    remarks = ()

    def __init__(self, config: DnsMosConfig) -> None:
        self._model = _dnsmos(config.num_threads)

    def judge(self, clips: Sequence[Clip]) -> list[Judgement]:
        """Return scores."""
        return [self._judge(clip) for clip in clips]

    def _judge(self, clip: Clip) -> Judgement:
        if not _is_long_enough(clip):
            return Unmeasured(f"dnsmos: shorter than {SHORTEST_CLIP_S} s, or silent")
        wave_N = at_16_khz(clip).clip(-1, 1)
        if len(wave_N) < DNSMOS_WINDOW:
            wave_N = np.resize(wave_N, DNSMOS_WINDOW)
        scores = self._model(wave_N, SAMPLE_RATE_HZ, is_personalized_MOS=False)
        return {"dnsmos": float(scores["ovrl_mos"])}


def _dnsmos(num_threads: int) -> Any:
    """Return the package's model, untyped: waveform to a dict of scores.

    Its own `__init__` opens the two networks without options, and they take all cores.
    """
    import onnxruntime
    from speechmos import dnsmos

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    folder = Path(dnsmos.__file__).parent / "dnsmos_models"
    model = dnsmos.DNSMOS.__new__(dnsmos.DNSMOS)
    model.onnx_sess, model.p808_onnx_sess = (
        onnxruntime.InferenceSession(folder / name, options, providers=["CPUExecutionProvider"])
        for name in ("sig_bak_ovr.onnx", "model_v8.onnx")
    )
    return model


def _computes_in_bf16(torch: Any) -> bool:
    """Whether the CPU multiplies in bfloat16; torch does it without, nine times slower than fp32.

    Measured on an AVX2 machine: 4.2 s a clip of 2.3 s, .46 s in fp32.
    """
    is_supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if not is_supported:
        logger.warning("distillmos: this CPU does not compute in bf16, so it listens in fp32")
    return is_supported


def _is_long_enough(clip: Clip) -> bool:
    return is_audible(clip) and len(clip.waveform_N) >= SHORTEST_CLIP_S * clip.sample_rate_hz
