import numpy as np
import pytest

from speechalign.codec.base import check_codes, check_wave
from speechalign.errors import DataError, MalformedCodes

GOOD_WAVE = np.zeros(320, np.float32)


@pytest.mark.parametrize(
    ("codes", "says"),
    [
        (np.zeros(4, np.int64), "shape"),
        (np.zeros((0, 4), np.int64), "shape"),
        (np.zeros((3, 4), np.int64), "shape"),
        (np.zeros((2, 0), np.int64), "shape"),
        (np.zeros((2, 4)), "integers"),
        (np.full((2, 4), 16), r"\[16, 16\]"),
        (np.full((2, 4), -1), r"\[-1, -1\]"),
    ],
)
def test_codes_that_no_decoder_can_speak_are_refused(codes: np.ndarray, says: str):
    with pytest.raises(MalformedCodes, match=says):
        check_codes(codes, num_codebooks=2, codebook_size=16)


@pytest.mark.parametrize("num_levels", [1, 2])
def test_codes_of_all_or_fewer_levels_are_taken(num_levels: int):
    check_codes(np.full((num_levels, 1), 15), num_codebooks=2, codebook_size=16)


@pytest.mark.parametrize(
    ("wave", "says"),
    [
        (np.zeros((320, 2), np.float32), "one channel"),
        (np.zeros(319, np.float32), "shorter"),
        (np.where(np.arange(320) == 7, np.nan, GOOD_WAVE), "NaN"),
        (np.where(np.arange(320) == 7, np.inf, GOOD_WAVE), "NaN"),
    ],
)
def test_waves_that_no_codec_can_encode_are_refused(wave: np.ndarray, says: str):
    with pytest.raises(DataError, match=says):
        check_wave(wave, min_num_samples=320)


def test_a_wave_of_one_frame_is_taken():
    check_wave(GOOD_WAVE, min_num_samples=320)
