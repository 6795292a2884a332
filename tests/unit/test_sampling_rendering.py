from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from speechalign.codec.base import check_codes
from speechalign.config.sampling import RenderingConfig
from speechalign.errors import ConfigError
from speechalign.policy.vocabulary import EOS_ID, Vocabulary
from speechalign.rows import NOT_RENDERED
from speechalign.sampling.rendering import Answer, Renderer

VOCABULARY = Vocabulary(symbols="a", num_codebooks=1, codebook_size=16)


class SumCodec:
    """One sample a frame: the sum of its codes over 100; a level-1 code of 13 breaks it."""

    name, sample_rate_hz, frame_rate_hz = "sum", 50, 50.0
    num_codebooks, codebook_size, fingerprint = 3, 16, "f"

    def __init__(self) -> None:
        self.num_decoded = 0

    def encode(self, wave_N: NDArray[np.float32]) -> NDArray[np.int64]:
        raise NotImplementedError

    def decode(self, codes_KT: NDArray[np.int64]) -> NDArray[np.float32]:
        check_codes(codes_KT, num_codebooks=3, codebook_size=16)
        if (codes_KT[0] == 13).any():
            raise RuntimeError("the vocoder broke")
        self.num_decoded += 1
        return (codes_KT.sum(0) / 100).astype(np.float32)


class CountingFiller:
    """Level k of a frame is level 1 plus k."""

    def fill(
        self,
        level1s: Sequence[NDArray[np.integer]],
        speakers_KT: Sequence[NDArray[np.integer]],
        num_levels: int,
    ) -> list[NDArray[np.int64]]:
        assert len(level1s) == len(speakers_KT)
        return [
            np.stack([codes_T.astype(np.int64) + k for k in range(num_levels)])
            for codes_T in level1s
        ]


def an_answer(*codes: int, voice: int = 1, end: tuple[int, ...] = (EOS_ID,)) -> Answer:
    return Answer(
        token_ids=(*(8 + code for code in codes), *end),
        speaker_codes_KT=np.full((3, 2), voice, np.int16),
        golden_codes_KT=np.array([[1, 2], [3, 4], [5, 6]], np.int16),
    )


def a_renderer(codec: SumCodec | None = None, **changes: Any) -> Renderer:
    config = RenderingConfig.model_validate({"num_levels": 3} | changes)
    return Renderer(codec or SumCodec(), VOCABULARY, CountingFiller(), config)


def test_the_levels_that_the_answer_lacks_are_filled() -> None:
    rendered = a_renderer(num_levels=2).render([an_answer(2, 4)])[0]
    np.testing.assert_allclose(rendered.waveform_N, [0.05, 0.09])
    np.testing.assert_allclose(rendered.reference_N, [0.03, 0.03])
    assert rendered.error == ""


def test_one_level_needs_no_filling() -> None:
    rendered = a_renderer(num_levels=1).render([an_answer(2, 4)])[0]
    np.testing.assert_allclose(rendered.waveform_N, [0.02, 0.04])


def test_a_truncated_answer_is_rendered_as_far_as_it_went() -> None:
    rendered = a_renderer(num_levels=1).render([an_answer(2, 4, end=())])[0]
    assert len(rendered.waveform_N) == 2


@pytest.mark.parametrize("answer", [an_answer(), an_answer(3, 16), an_answer(3, -8)])
def test_an_answer_that_says_nothing_is_empty_and_no_error(answer: Answer) -> None:
    empty, other = a_renderer().render([answer, an_answer(2)])
    assert empty.waveform_N.size == 0
    assert empty.error == ""
    np.testing.assert_allclose(empty.reference_N, [0.03, 0.03])
    np.testing.assert_allclose(other.waveform_N, [0.09])


def test_an_answer_that_the_codec_breaks_on_leaves_the_others_alone() -> None:
    broken, other = a_renderer().render([an_answer(13), an_answer(2)])
    assert broken.error == NOT_RENDERED + "the vocoder broke"
    assert broken.waveform_N.size == 0
    assert other.error == ""
    assert other.waveform_N.size == 1


def test_a_broken_voice_is_an_error_of_its_row_alone() -> None:
    broken, other = a_renderer().render([an_answer(2, voice=99), an_answer(2)])
    assert broken.error.startswith(NOT_RENDERED + "codes lie in [0, 16)")
    assert other.error == ""


def test_a_voice_that_failed_once_is_tried_again() -> None:
    class Recovers(SumCodec):
        def decode(self, codes_KT: NDArray[np.int64]) -> NDArray[np.float32]:
            if not self.num_decoded:
                self.num_decoded += 1
                raise RuntimeError("out of memory")
            return super().decode(codes_KT)

    renderer = a_renderer(Recovers())
    errors = [renderer.render([an_answer(2)])[0].error for _ in range(2)]
    assert errors == [f"{NOT_RENDERED}out of memory", ""]


def test_samples_of_a_prompt_share_one_rendered_voice() -> None:
    codec = SumCodec()
    a_renderer(codec).render([an_answer(2), an_answer(3), an_answer(4)])
    assert codec.num_decoded == 3 + 1


def test_the_recording_can_be_rendered_instead() -> None:
    rendered = a_renderer(source="recording", num_levels=2).render([an_answer(9)])[0]
    np.testing.assert_allclose(rendered.waveform_N, [0.04, 0.06])


def test_more_levels_than_the_codec_has_are_a_config_error() -> None:
    with pytest.raises(ConfigError, match="num_levels 4 exceeds the 3 codebooks"):
        a_renderer(num_levels=4)


def test_a_policy_of_two_levels_cannot_be_filled_from_the_first_alone() -> None:
    two = Vocabulary(symbols="a", num_codebooks=2, codebook_size=16)
    with pytest.raises(ConfigError, match="predicts 2 levels"):
        Renderer(SumCodec(), two, CountingFiller(), RenderingConfig(num_levels=3))
