"""From what a run was told to the codec it uses."""

from typing import assert_never

from speechalign.codec.base import Codec
from speechalign.codec.embedded import EmbeddedCodec
from speechalign.codec.encodec_hf import EncodecHfCodec
from speechalign.codec.encodec_package import EncodecPackageCodec
from speechalign.config.codec import (
    CodecConfig,
    EmbeddedCodecConfig,
    EncodecHfConfig,
    EncodecPackageConfig,
)


def build_codec(config: CodecConfig) -> Codec:
    """Return the codec that a config names; its weights are loaded here, in the actor."""
    match config:
        case EmbeddedCodecConfig():
            return EmbeddedCodec.load(config.path)
        case EncodecPackageConfig():
            return EncodecPackageCodec.load(config)
        case EncodecHfConfig():
            return EncodecHfCodec.load(config)
        case _:
            assert_never(config)
