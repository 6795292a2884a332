"""EnCodec at 24 kHz, from the `encodec` package and a local weights file.

Shapes: B batch, C channels, K codebooks, T frames, N samples.
"""

import pickle
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from speechalign.artifacts import sha256_of
from speechalign.codec.base import check_codes, check_wave
from speechalign.codec.encodec_import import EncodecModel
from speechalign.config.codec import ENCODEC_BANDWIDTHS_KBPS, EncodecPackageConfig
from speechalign.errors import ConfigError, CorruptArtifact

WEIGHTS_FILE = "encodec_24khz-d7cc33bc.th"

_SAMPLE_RATE_HZ = 24_000


class EncodecPackageCodec:
    """EnCodec of Défossez et al. 2022: causal, 75 frames a second."""

    name = "encodec"
    sample_rate_hz = _SAMPLE_RATE_HZ

    def __init__(self, model: EncodecModel, *, bandwidth_kbps: float, fingerprint: str) -> None:
        model.set_target_bandwidth(bandwidth_kbps)
        self._model = model.eval()
        self.fingerprint = fingerprint
        self.frame_rate_hz = float(model.frame_rate)
        self.codebook_size = model.quantizer.bins
        self.num_codebooks = model.quantizer.get_num_quantizers_for_bandwidth(
            model.frame_rate, bandwidth_kbps
        )

    @classmethod
    def load(cls, config: EncodecPackageConfig) -> "EncodecPackageCodec":
        """Load the weights of a local directory; nothing is downloaded, no pickled code runs.

        Raises:
            ConfigError: if the directory has no weights file.
            CorruptArtifact: if the file is not the weights of this model.
        """
        path = config.path / WEIGHTS_FILE
        if not path.is_file():
            raise ConfigError(f"{path} does not exist; put EnCodec's 24 kHz weights there")
        model = untrained_model()
        try:
            model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except (RuntimeError, pickle.UnpicklingError, EOFError, TypeError) as error:
            raise CorruptArtifact(
                f"{path} is not the weights of EnCodec at 24 kHz; fetch it anew: {error}"
            ) from error
        fingerprint = f"{sha256_of(path)[:16]}-{config.bandwidth_kbps:g}"
        return cls(model, bandwidth_kbps=config.bandwidth_kbps, fingerprint=fingerprint)

    @torch.no_grad()
    def encode(self, wave_N: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return codes_KT."""
        check_wave(wave_N, min_num_samples=round(_SAMPLE_RATE_HZ / self.frame_rate_hz))
        wave_BCN = torch.from_numpy(np.array(wave_N, np.float32))[None, None]
        [(codes_BKT, _scale)] = self._model.encode(wave_BCN)
        return codes_BKT[0].numpy()

    @torch.no_grad()
    def decode(self, codes_KT: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return wave_N; codes of fewer than K levels are the first ones."""
        check_codes(codes_KT, num_codebooks=self.num_codebooks, codebook_size=self.codebook_size)
        codes_BKT = torch.from_numpy(np.array(codes_KT, np.int64))[None]
        return self._model.decode([(codes_BKT, None)])[0, 0].numpy()


def untrained_model() -> EncodecModel:
    """Return the 24 kHz model with random weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it uses torch's former weight_norm
        make: Any = EncodecModel  # its named constructors download; this one does not
        return make._get_model(list(ENCODEC_BANDWIDTHS_KBPS), _SAMPLE_RATE_HZ, name="encodec_24khz")
