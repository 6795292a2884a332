"""EnCodec from transformers, from a local directory or the hub.

Shapes: B batch, C channels, K codebooks, T frames, N samples; the leading 1 of the model's
codes counts chunks, of which an unchunked model has one.
"""

import hashlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import EncodecModel

from speechalign.codec.base import check_codes, check_wave
from speechalign.config.codec import EncodecHfConfig
from speechalign.errors import ConfigError


class EncodecHfCodec:
    """EnCodec of Défossez et al. 2022 as transformers has it; one channel, not chunked."""

    name = "encodec_hf"

    def __init__(self, model: EncodecModel, *, bandwidth_kbps: float) -> None:
        self._model = model.eval()
        self._bandwidth_kbps = bandwidth_kbps
        self.sample_rate_hz: int = model.config.sampling_rate
        self.frame_rate_hz = float(model.config.frame_rate)
        self.codebook_size: int = model.config.codebook_size
        self.num_codebooks: int = model.quantizer.get_num_quantizers_for_bandwidth(bandwidth_kbps)
        self.fingerprint = f"{_weights_digest(model)}-{bandwidth_kbps:g}"

    @classmethod
    def load(cls, config: EncodecHfConfig) -> "EncodecHfCodec":
        """Load a model.

        Raises:
            ConfigError: if there is no such model, or it has another kind of input or bandwidth.
        """
        try:
            model = EncodecModel.from_pretrained(config.model)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"codec.model {config.model!r} is neither a directory with an EnCodec model nor "
                f"one that the hub gives: {error}"
            ) from error
        if model.config.audio_channels != 1 or model.config.chunk_length_s is not None:
            raise ConfigError(
                f"{config.model}: a model of {model.config.audio_channels} channels and chunks "
                f"of {model.config.chunk_length_s} s; use one of one channel, not chunked, such "
                "as facebook/encodec_24khz"
            )
        if config.bandwidth_kbps not in model.config.target_bandwidths:
            raise ConfigError(
                f"{config.model} has no bandwidth of {config.bandwidth_kbps} kbps; choose of "
                f"{model.config.target_bandwidths}"
            )
        return cls(model, bandwidth_kbps=config.bandwidth_kbps)

    @torch.no_grad()
    def encode(self, wave_N: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return codes_KT."""
        check_wave(wave_N, min_num_samples=round(self.sample_rate_hz / self.frame_rate_hz))
        wave_BCN = torch.from_numpy(np.array(wave_N, np.float32))[None, None]
        codes_1BKT, *_ = self._model.encode(
            wave_BCN, bandwidth=self._bandwidth_kbps, return_dict=False
        )
        return codes_1BKT[0, 0].numpy()

    @torch.no_grad()
    def decode(self, codes_KT: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return wave_N; codes of fewer than K levels are the first ones."""
        check_codes(codes_KT, num_codebooks=self.num_codebooks, codebook_size=self.codebook_size)
        codes_1BKT = torch.from_numpy(np.array(codes_KT, np.int64))[None, None]
        model: Any = self._model  # its annotations are narrower than what it takes
        wave_BCN, *_ = model.decode(codes_1BKT, [None], return_dict=False)
        return wave_BCN[0, 0].numpy()


def _weights_digest(model: EncodecModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
