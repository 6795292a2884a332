"""Who speaks: cosine of GE2E embeddings (Wan et al. 2018, through resemblyzer)."""

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from speechalign.config.judges import SpeakerConfig
from speechalign.judges.base import Judgement, is_audible
from speechalign.judges.whisper import SAMPLE_RATE_HZ, at_16_khz
from speechalign.types import Clip, Unmeasured

SHORTEST_VOICE_S = 0.4
CACHE_SIZE = 512


class SpeakerSimilarity:
    """Compares a clip with its speaker prompt, both rendered by the same codec (SIM-r)."""

    name = "speaker"
    measures = ("speaker_similarity",)
    remarks = ()

    def __init__(self, config: SpeakerConfig) -> None:
        import torch

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pkg_resources, through webrtcvad
            import resemblyzer

        torch.set_num_threads(config.num_threads)
        self._preprocess = resemblyzer.preprocess_wav
        self._encoder: Any = resemblyzer.VoiceEncoder("cpu", verbose=False)
        self._references: OrderedDict[bytes, NDArray[np.float32] | None] = OrderedDict()

    def judge(self, clips: Sequence[Clip]) -> list[Judgement]:
        """Return similarities; a clip without enough voice cannot be compared."""
        return [self._judge(clip) for clip in clips]

    def _judge(self, clip: Clip) -> Judgement:
        if not is_audible(clip):
            return Unmeasured("speaker: the clip is silent")
        voice_D = self._embed(at_16_khz(clip))
        reference_D = self._reference(clip)
        if voice_D is None or reference_D is None:
            which = "clip" if voice_D is None else "speaker prompt"
            return Unmeasured(f"speaker: the {which} has less than {SHORTEST_VOICE_S} s of voice")
        return {"speaker_similarity": float(voice_D @ reference_D)}

    def _reference(self, clip: Clip) -> NDArray[np.float32] | None:
        key = clip.reference_waveform_N.tobytes()
        if key not in self._references:
            reference = Clip(
                sample_id=clip.sample_id,
                text=clip.text,
                waveform_N=clip.reference_waveform_N,
                reference_waveform_N=clip.reference_waveform_N,
                sample_rate_hz=clip.sample_rate_hz,
                golden_duration_s=0.0,
            )
            self._references[key] = self._embed(at_16_khz(reference))
            if len(self._references) > CACHE_SIZE:
                self._references.popitem(last=False)
        return self._references[key]

    def _embed(self, waveform_N: NDArray[np.float32]) -> NDArray[np.float32] | None:
        voice_N = self._preprocess(waveform_N, source_sr=SAMPLE_RATE_HZ)
        if len(voice_N) < SHORTEST_VOICE_S * SAMPLE_RATE_HZ:
            return None
        return self._encoder.embed_utterance(voice_N)
