from pathlib import Path

import numpy as np
import pytest
import torch

from speechalign.codec.build import build_codec
from speechalign.codec.embedded import EmbeddedCodec, round_to_half, save_embedded
from speechalign.codec.embedded_model import (
    VOICING,
    EmbeddedModel,
    stack_frames,
    unstack_frames,
)
from speechalign.config.codec import EmbeddedCodecConfig, EmbeddedModelConfig
from speechalign.errors import ConfigError, CorruptArtifact, DataError, MalformedCodes

TINY = EmbeddedModelConfig(
    hidden_dim=16,
    latent_dim=8,
    post_dim=8,
    num_acoustic_codebooks=2,
    codebook_size=16,
    content_dilations=(1, 2),
    acoustic_dilations=(1,),
    decoder_dilations=(1, 2),
    post_dilations=(1,),
)
WAVE_N = (0.3 * np.sin(2 * np.pi * 140 * np.arange(8000) / 16_000)).astype(np.float32)


def a_model() -> EmbeddedModel:
    torch.manual_seed(0)
    model = EmbeddedModel(TINY).eval()
    for quantiser in (model.content.quantiser, model.acoustics.quantiser):
        for layer in quantiser.vq.layers:
            layer._codebook.embed.normal_(0.0, 0.3)
            layer._codebook.inited.fill_(1.0)
    model.set_statistics(torch.linspace(-2, 2, 43), torch.linspace(0.5, 2, 43))
    round_to_half(model)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("codecs") / "codec"
    save_embedded(a_model(), path)
    return path


@pytest.fixture(scope="module")
def codec(folder: Path) -> EmbeddedCodec:
    return EmbeddedCodec.load(folder)


def test_speech_becomes_fifty_frames_a_second_and_as_much_speech_again(codec: EmbeddedCodec):
    codes_KT = codec.encode(WAVE_N)
    assert (codes_KT.shape, codes_KT.dtype) == ((3, 25), np.int64)
    wave_N = codec.decode(codes_KT)
    assert (wave_N.shape, wave_N.dtype) == ((8000,), np.float32)


def test_fewer_levels_are_the_first_ones(codec: EmbeddedCodec):
    codes_KT = codec.encode(WAVE_N)
    by_level = [codec.decode_features(codes_KT[:k]) for k in (1, 2, 3)]
    assert not np.allclose(by_level[0], by_level[1])
    assert not np.allclose(by_level[1], by_level[2])
    changed_KT = codes_KT.copy()
    changed_KT[2] = (changed_KT[2] + 1) % 16
    np.testing.assert_array_equal(codec.decode_features(changed_KT[:2]), by_level[1])


def test_a_code_out_of_its_codebook_is_refused(codec: EmbeddedCodec):
    with pytest.raises(MalformedCodes, match=r"\[0, 16\)"):
        codec.decode(np.full((3, 4), 16))


def test_a_wave_with_nan_is_refused(codec: EmbeddedCodec):
    with pytest.raises(DataError, match="NaN"):
        codec.encode(np.full(640, np.nan, np.float32))


def test_what_was_saved_is_what_was_trained(codec: EmbeddedCodec):
    features_BFD = torch.randn(1, 40, 43)
    np.testing.assert_array_equal(
        codec.encode_features(features_BFD[0].numpy()), a_model().encode(features_BFD)[:, 0]
    )


def test_codes_do_not_depend_on_the_batch():
    model = a_model()
    features_BFD = torch.randn(4, 30, 43)
    alone_KBT = torch.cat([model.encode(row[None]) for row in features_BFD], 1)
    assert (model.encode(features_BFD) == alone_KBT).float().mean() > 0.99


def test_decoded_voicing_is_a_probability():
    features_BFD = a_model().decode(torch.zeros(3, 1, 5, dtype=torch.int64))
    voicing_BF = features_BFD[..., VOICING]
    assert ((voicing_BF > 0) & (voicing_BF < 1)).all()


def test_unstacking_undoes_stacking():
    x_BFD = torch.randn(2, 6, 43)
    assert torch.equal(unstack_frames(stack_frames(x_BFD)), x_BFD)
    assert torch.equal(stack_frames(x_BFD)[0, 1], torch.cat([x_BFD[0, 2], x_BFD[0, 3]]))


def test_the_fingerprint_is_of_the_weights(codec: EmbeddedCodec, tmp_path: Path):
    model = a_model()
    save_embedded(model, tmp_path / "same")
    assert EmbeddedCodec.load(tmp_path / "same").fingerprint == codec.fingerprint
    model.content.quantiser.vq.layers[0]._codebook.embed[0, 0] += 1
    save_embedded(model, tmp_path / "other")
    assert EmbeddedCodec.load(tmp_path / "other").fingerprint != codec.fingerprint


def test_a_flipped_bit_is_noticed(tmp_path: Path):
    save_embedded(a_model(), tmp_path / "codec")
    weights = tmp_path / "codec" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CorruptArtifact, match=r"model\.safetensors"):
        EmbeddedCodec.load(tmp_path / "codec")


def test_weights_of_another_shape_are_refused(tmp_path: Path):
    class Mislabelled(EmbeddedModel):
        pass

    model = Mislabelled(TINY)
    model.config = TINY.model_copy(update={"hidden_dim": 32})
    save_embedded(model, tmp_path / "codec")
    with pytest.raises(CorruptArtifact, match="not of the model"):
        EmbeddedCodec.load(tmp_path / "codec")


def test_a_directory_without_a_codec_is_a_mistake_of_the_run(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"has no codec; train one with `speechalign codec`"):
        build_codec(EmbeddedCodecConfig(path=tmp_path))
