"""Streamed sound is the sound of the whole answer."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from speechalign.codec.embedded import EmbeddedCodec
from speechalign.config.serving import StreamingConfig
from speechalign.policy.nar import load_nar
from speechalign.rows import codes_from_flat
from speechalign.serving.windows import Heard, Schedule, Window, WindowRenderer

ASSETS = Path("speechalign/assets")
LEVELS = 3
TOLERANCE = 1e-4
"""Of full scale, between a streamed sample and the same one decoded at once."""


def golden_codes(count: int) -> list[NDArray[np.int16]]:
    rows = pq.read_table(ASSETS / "golden.parquet").slice(0, 60).to_pylist()
    long = [row for row in rows if 120 < row["num_frames"] < 260][:count]
    return [codes_from_flat(row["codes"], len(row["codes"]) // row["num_frames"]) for row in long]


def streamed(
    renderer: WindowRenderer, config: StreamingConfig, codes_KT: NDArray[np.int16]
) -> list[tuple[Heard, NDArray[np.float32], Heard]]:
    """Return the windows: what was heard before, the new sound, what was heard after."""
    schedule, heard, num_frames = Schedule(config), Heard(), codes_KT.shape[1]
    parts: list[tuple[Heard, NDArray[np.float32], Heard]] = []
    for known in range(1, num_frames + 1):
        if schedule.is_due(known) or known == num_frames:
            window = Window(
                codes_kT=codes_KT[:1, :known].astype(np.int64),
                speaker_codes_KT=codes_KT[:, :100],
                heard=heard,
                is_last=known == num_frames,
            )
            wave_N, after = renderer.render(window)
            parts.append((heard, wave_N, after))
            heard = after
    return parts


def test_streamed_sound_is_that_of_its_codes_decoded_at_once():
    codec, nar, config = EmbeddedCodec.load(), load_nar(ASSETS / "nar"), StreamingConfig()
    renderer = WindowRenderer(codec, nar, LEVELS, config)
    for codes_KT in golden_codes(3):
        parts = streamed(renderer, config, codes_KT)
        streamed_N = np.concatenate([wave_N for _, wave_N, _ in parts])
        whole_N = codec.decode(parts[-1][2].codes_KT)
        assert len(parts) > 3
        assert len(streamed_N) == len(whole_N) == codes_KT.shape[1] * 320
        assert np.abs(streamed_N - whole_N).max() < TOLERANCE


def test_the_codes_of_a_stream_are_nearly_all_those_of_the_whole_answer():
    codec, nar, config = EmbeddedCodec.load(), load_nar(ASSETS / "nar"), StreamingConfig()
    renderer = WindowRenderer(codec, nar, LEVELS, config)
    differing = total = 0
    for codes_KT in golden_codes(8):
        (whole_KT,) = nar.fill([codes_KT[0]], [codes_KT[:, :100]], LEVELS)
        settled_KT = streamed(renderer, config, codes_KT)[-1][2].codes_KT
        assert (settled_KT[0] == codes_KT[0]).all()
        differing += int((settled_KT != whole_KT).any(axis=0).sum())
        total += codes_KT.shape[1]
    assert differing / total < 0.005


def test_at_a_join_the_new_window_says_what_the_old_one_would_have_said():
    codec, nar = EmbeddedCodec.load(), load_nar(ASSETS / "nar")
    config = StreamingConfig(settling_frames=2, first_window_frames=20)  # codes do differ here
    renderer = WindowRenderer(codec, nar, LEVELS, config)
    (codes_KT,) = golden_codes(1)
    parts = streamed(renderer, config, codes_KT)
    joins = [(before.tail_X, wave_N) for before, wave_N, _ in parts if len(before.tail_X)]
    assert joins
    for tail_X, wave_N in joins:
        assert np.abs(wave_N[: len(tail_X)] - tail_X).max() < TOLERANCE


def test_codes_that_are_settled_never_change():
    codec, nar = EmbeddedCodec.load(), load_nar(ASSETS / "nar")
    config = StreamingConfig(settling_frames=2, first_window_frames=20)
    renderer = WindowRenderer(codec, nar, LEVELS, config)
    (codes_KT,) = golden_codes(1)
    states = [after for _, _, after in streamed(renderer, config, codes_KT)]
    for earlier, later in pairwise(states):
        kept_KT = later.codes_KT[:, : earlier.codes_KT.shape[1]]
        assert (kept_KT == earlier.codes_KT).all()


def test_an_empty_answer_has_no_sound():
    renderer = WindowRenderer(
        EmbeddedCodec.load(), load_nar(ASSETS / "nar"), LEVELS, StreamingConfig()
    )
    window = Window(
        codes_kT=np.zeros((1, 0), np.int64),
        speaker_codes_KT=np.zeros((8, 100), np.int16),
        heard=Heard(),
        is_last=True,
    )
    wave_N, heard = renderer.render(window)
    assert (len(wave_N), heard.num_frames) == (0, 0)


def test_windows_grow_and_are_due_once_each():
    config = StreamingConfig(
        first_window_frames=40, window_growth=1.5, max_window_frames=30, settling_frames=1
    )
    schedule = Schedule(config)
    assert [n for n in range(1, 150) if schedule.is_due(n)] == [40, 60, 90, 120]


def test_a_first_window_without_sound_is_refused():
    with pytest.raises(ValidationError, match="the first window has no sound"):
        StreamingConfig(first_window_frames=26, first_settling_frames=12, lookahead_frames=14)


def test_the_first_window_settles_soon_and_later_ones_with_more_to_see():
    config = StreamingConfig(
        first_window_frames=32, first_settling_frames=12, settling_frames=24, lookahead_frames=12
    )
    settling = [config.settling_of(known) for known in (30, 32, 35, 36, 40, 79, 80, 200)]
    assert settling == [12, 12, 12, 13, 14, 23, 24, 24]


def test_a_window_is_heard_as_far_as_its_own_settling_goes():
    config = StreamingConfig(first_window_frames=32, first_settling_frames=12, lookahead_frames=12)
    renderer = WindowRenderer(EmbeddedCodec.load(), load_nar(ASSETS / "nar"), LEVELS, config)
    (codes_KT,) = golden_codes(1)
    for known, settled in ((32, 20), (40, 26), (80, 56)):
        window = Window(
            codes_kT=codes_KT[:1, :known].astype(np.int64),
            speaker_codes_KT=codes_KT[:, :100],
            heard=Heard(),
            is_last=False,
        )
        wave_N, heard = renderer.render(window)
        assert heard.codes_KT.shape[1] == settled
        assert len(wave_N) == (settled - 12) * 320
