"""The codec that the package carries: vocoder features, coded by a small network.

Shapes: K codebooks, T frames of 20 ms, F frames of 10 ms, N samples, D dims.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from speechalign.artifacts import committed_folder, is_committed, sha256_of, verify_folder
from speechalign.codec.base import check_codes, check_wave
from speechalign.codec.embedded_model import FRAMES_PER_CODE, EmbeddedModel
from speechalign.codec.vocoder import analyse, synthesise
from speechalign.config.codec import EmbeddedModelConfig
from speechalign.errors import ConfigError, CorruptArtifact

ASSET_DIR = Path(__file__).parents[1] / "assets" / "codec"
SAMPLE_RATE_HZ = 16_000
SAMPLES_PER_FRAME = 320

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_TRAINING_ONLY = ("embed_avg", "cluster_size")


class EmbeddedCodec:
    """Codes of 16 kHz speech at 50 frames a second."""

    name = "embedded"
    sample_rate_hz = SAMPLE_RATE_HZ
    frame_rate_hz = SAMPLE_RATE_HZ / SAMPLES_PER_FRAME

    def __init__(self, model: EmbeddedModel, fingerprint: str) -> None:
        self.model = model.eval()
        self.fingerprint = fingerprint
        self.num_codebooks = 1 + model.config.num_acoustic_codebooks
        self.codebook_size = model.config.codebook_size

    @classmethod
    def load(cls, path: Path | None = None) -> "EmbeddedCodec":
        """Load the codec of a directory, or the package's own.

        Raises:
            ConfigError: if the directory has no codec.
            CorruptArtifact: if a file differs from the manifest.
        """
        path = path or ASSET_DIR
        if not is_committed(path):
            raise ConfigError(
                f"{path} has no codec; train one with `speechalign codec`, or set codec.path to "
                "the folder of one"
            )
        verify_folder(path)
        model = EmbeddedModel(_read_config(path / _CONFIG))
        load_weights(model, path / _WEIGHTS)
        return cls(model, _fingerprint(path))

    def encode(self, wave_N: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return codes_KT; the samples of an unfinished last frame are left out."""
        check_wave(wave_N, min_num_samples=SAMPLES_PER_FRAME)
        return self.encode_features(analyse(np.ascontiguousarray(wave_N, dtype=np.float32)))

    def encode_features(self, features_FD: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return codes_KT of what the vocoder's analysis gave."""
        num_frames = len(features_FD) // FRAMES_PER_CODE * FRAMES_PER_CODE
        features_BFD = torch.from_numpy(np.array(features_FD[:num_frames], np.float32))[None]
        return self.model.encode(features_BFD)[:, 0].numpy()

    def decode(self, codes_KT: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return wave_N; codes of fewer than K levels are the first ones."""
        return synthesise(self.decode_features(codes_KT)).astype(np.float32)

    def decode_features(self, codes_KT: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return features_FD for the vocoder's synthesis."""
        check_codes(codes_KT, num_codebooks=self.num_codebooks, codebook_size=self.codebook_size)
        codes_KBT = torch.from_numpy(np.array(codes_KT, np.int64))[:, None]
        return self.model.decode(codes_KBT)[0].numpy()


def save_embedded(model: EmbeddedModel, path: Path) -> None:
    """Commit a codec to a directory: config, weights in half precision, manifest."""
    facts: dict[str, str] = {"kind": "codec"}
    with committed_folder(path, facts) as folder:
        (folder / _CONFIG).write_text(model.config.model_dump_json(indent=2) + "\n")
        save_file(_exported(model), folder / _WEIGHTS)
        facts["codec_fingerprint"] = _fingerprint(folder)


@torch.no_grad()
def round_to_half(module: torch.nn.Module) -> None:
    """Round weights to what half precision keeps, so that a saved codec is the trained one."""
    for name, tensor in module.state_dict().items():
        if not name.endswith(_TRAINING_ONLY):
            tensor.copy_(tensor.half().float())


def load_weights(model: EmbeddedModel, path: Path) -> None:
    """Read weights into a model.

    Raises:
        CorruptArtifact: if the weights are not those of such a model.
    """
    state = {name: tensor.float() for name, tensor in load_file(path).items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in _exported(model).items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if wanted != found:
        differing = sorted(set(wanted.items()) ^ set(found.items()))[:3]
        raise CorruptArtifact(
            f"{path}: the weights are not of the model that config.json describes; they differ "
            f"at {differing}; copy both files from one training"
        )
    model.load_state_dict(state, strict=False)


def _exported(model: EmbeddedModel) -> dict[str, Tensor]:
    return {
        name: tensor.half().contiguous()
        for name, tensor in model.state_dict().items()
        if not name.endswith(_TRAINING_ONLY)
    }


def _read_config(path: Path) -> EmbeddedModelConfig:
    try:
        return EmbeddedModelConfig.model_validate_json(path.read_text())
    except ValidationError as error:
        raise CorruptArtifact(
            f"{path}: not the config of an embedded codec: {error.errors()[0]['msg']}"
        ) from error


def _fingerprint(path: Path) -> str:
    digests = sha256_of(path / _CONFIG) + sha256_of(path / _WEIGHTS)
    return hashlib.sha256(digests.encode()).hexdigest()[:16]
