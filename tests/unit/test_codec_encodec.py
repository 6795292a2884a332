from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import EncodecConfig
from transformers import EncodecModel as HfEncodecModel

from speechalign.codec.base import Codec
from speechalign.codec.build import build_codec
from speechalign.codec.encodec_package import WEIGHTS_FILE, untrained_model
from speechalign.config.codec import EncodecHfConfig, EncodecPackageConfig
from speechalign.errors import ConfigError, CorruptArtifact, DataError, MalformedCodes

WAVE_N = (0.3 * np.sin(2 * np.pi * 140 * np.arange(4800) / 24_000)).astype(np.float32)


def spread_codebooks(model: torch.nn.Module) -> None:
    """Give random codebooks to a model whose own are all zeros until they are learned."""
    for name, buffer in model.named_buffers():
        if name.endswith(".embed"):
            buffer.normal_()


@pytest.fixture(scope="module")
def package_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = untrained_model()
    spread_codebooks(model)
    path = tmp_path_factory.mktemp("encodec")
    torch.save(model.state_dict(), path / WEIGHTS_FILE)
    return path


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = EncodecConfig(num_filters=4, hidden_size=16, codebook_dim=16, num_lstm_layers=1)
    model = HfEncodecModel(config)
    spread_codebooks(model)
    path = tmp_path_factory.mktemp("encodec_hf")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=["package", "hf"])
def codec(request: pytest.FixtureRequest, package_dir: Path, hf_dir: Path) -> Codec:
    if request.param == "package":
        return build_codec(EncodecPackageConfig(path=package_dir, bandwidth_kbps=6.0))
    return build_codec(EncodecHfConfig(model=str(hf_dir), bandwidth_kbps=6.0))


def test_speech_becomes_codes_and_speech_again(codec: Codec):
    assert (codec.sample_rate_hz, codec.frame_rate_hz) == (24_000, 75.0)
    codes_KT = codec.encode(WAVE_N)
    assert codes_KT.shape == (codec.num_codebooks, 15) == (8, 15)
    assert codes_KT.dtype == np.int64
    assert codes_KT.max() < codec.codebook_size == 1024
    assert codec.decode(codes_KT).shape == (4800,)


def test_fewer_levels_are_the_first_ones(codec: Codec):
    codes_KT = codec.encode(WAVE_N)
    changed_KT = codes_KT.copy()
    changed_KT[1:] = (changed_KT[1:] + 1) % 1024
    np.testing.assert_array_equal(codec.decode(changed_KT[:1]), codec.decode(codes_KT[:1]))


def test_codes_of_another_codec_are_refused(codec: Codec):
    with pytest.raises(MalformedCodes, match="1024"):
        codec.decode(np.full((8, 3), 1024))


def test_two_channels_are_refused(codec: Codec):
    with pytest.raises(DataError, match="one channel"):
        codec.encode(np.zeros((2, 4800), np.float32))


def test_another_bandwidth_is_another_codec(codec: Codec, package_dir: Path):
    other = build_codec(EncodecPackageConfig(path=package_dir, bandwidth_kbps=1.5))
    assert other.num_codebooks == 2
    assert other.fingerprint != codec.fingerprint


def test_a_directory_without_weights_is_a_mistake_of_the_run(tmp_path: Path):
    with pytest.raises(ConfigError, match=WEIGHTS_FILE):
        build_codec(EncodecPackageConfig(path=tmp_path))
    with pytest.raises(ConfigError, match="neither"):
        build_codec(EncodecHfConfig(model=str(tmp_path)))


def test_a_page_saved_as_weights_is_refused(tmp_path: Path):
    (tmp_path / WEIGHTS_FILE).write_text("<html>not found</html>")
    with pytest.raises(CorruptArtifact, match="fetch it anew"):
        build_codec(EncodecPackageConfig(path=tmp_path))


def test_a_bandwidth_that_the_model_lacks_is_a_mistake_of_the_run(hf_dir: Path):
    with pytest.raises(ConfigError, match="bandwidth"):
        build_codec(EncodecHfConfig(model=str(hf_dir), bandwidth_kbps=7.0))
    with pytest.raises(ValueError, match="choose of"):
        EncodecPackageConfig(path=hf_dir, bandwidth_kbps=7.0)
