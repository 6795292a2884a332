"""What a codec is, and what it refuses.

Shapes: K codebooks, T frames, N samples.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from speechalign.errors import DataError, MalformedCodes


class Codec(Protocol):
    """Turns speech into codes and back; every method is deterministic."""

    @property
    def name(self) -> str:
        """What people call it."""
        ...

    @property
    def sample_rate_hz(self) -> int:
        """Of the waveforms it takes and gives."""
        ...

    @property
    def frame_rate_hz(self) -> float:
        """How many frames of codes a second of speech has."""
        ...

    @property
    def num_codebooks(self) -> int:
        """K of the codes that `encode` returns."""
        ...

    @property
    def codebook_size(self) -> int:
        """Codes lie in [0, codebook_size)."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal for two codecs exactly when their codes mean the same."""
        ...

    def encode(self, wave_N: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return codes_KT.

        Raises:
            DataError: if the waveform is not one channel of finite samples, a frame or more.
        """
        ...

    def decode(self, codes_KT: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return wave_N; codes of fewer than K levels are the first ones.

        Raises:
            MalformedCodes: if the codes have no level, no frame, too many levels, or one is
                out of its codebook.
        """
        ...


def check_wave(wave_N: NDArray[np.float32], *, min_num_samples: int) -> None:
    """Refuse a waveform that no codec can encode.

    Raises:
        DataError: if the waveform is not one channel of finite samples, a frame or more.
    """
    if wave_N.ndim != 1:
        raise DataError(f"a waveform has one channel, not shape {wave_N.shape}; downmix it first")
    if wave_N.size < min_num_samples:
        raise DataError(
            f"a waveform of {wave_N.size} samples is shorter than one frame of {min_num_samples}; "
            "drop the clip"
        )
    if not np.isfinite(wave_N).all():
        raise DataError("the waveform has samples that are NaN or infinite; quarantine the clip")


def check_codes(codes_KT: NDArray[np.int64], *, num_codebooks: int, codebook_size: int) -> None:
    """Refuse codes that no decoder can speak.

    Raises:
        MalformedCodes: if the codes have no level, no frame, too many levels, or one is out of
            its codebook.
    """
    if codes_KT.ndim != 2 or not 1 <= codes_KT.shape[0] <= num_codebooks or not codes_KT.shape[1]:
        raise MalformedCodes(
            f"codes have shape (levels 1 to {num_codebooks}, frames), not {codes_KT.shape}"
        )
    if not np.issubdtype(codes_KT.dtype, np.integer):
        raise MalformedCodes(f"codes are integers, not {codes_KT.dtype}")
    low, high = int(codes_KT.min()), int(codes_KT.max())
    if low < 0 or high >= codebook_size:
        raise MalformedCodes(
            f"codes lie in [0, {codebook_size}), these in [{low}, {high}]; were token ids "
            "decoded without their layout, or do they come from another codec?"
        )


def check_fingerprint(found: str, expected: str, of: str) -> None:
    """Refuse codes of one codec to a part made for another.

    Raises:
        DataError: the fingerprints differ.
    """
    if found != expected:
        raise DataError(
            f"the data have codec fingerprint {found}, {of} {expected}: their codes mean "
            "different sounds; prepare the data again with that codec, or take another policy"
        )
