"""The one door to the `encodec` package."""

from speechalign.audio.torchaudio_stand_in import torchaudio_for_import

with torchaudio_for_import():
    from encodec.model import EncodecModel
    from encodec.quantization.vq import ResidualVectorQuantizer

__all__ = ["EncodecModel", "ResidualVectorQuantizer"]
