"""From what a run was told to the codec it uses."""

from typing import assert_never

from speechalign.codec.base import Codec
from speechalign.config.codec import (
    CodecConfig,
    EmbeddedCodecConfig,
    EncodecHfConfig,
    EncodecPackageConfig,
)


def build_codec(config: CodecConfig) -> Codec:
    """Return the codec that a config names; its weights are loaded here, in the actor.

    So is its library: transformers alone takes 5 s of a core, and the embedded codec needs none.
    """
    match config:
        case EmbeddedCodecConfig():
            from speechalign.codec.embedded import EmbeddedCodec

            return EmbeddedCodec.load(config.path)
        case EncodecPackageConfig():
            from speechalign.codec.encodec_package import EncodecPackageCodec

            return EncodecPackageCodec.load(config)
        case EncodecHfConfig():
            from speechalign.codec.encodec_hf import EncodecHfCodec

            return EncodecHfCodec.load(config)
        case _:
            assert_never(config)
