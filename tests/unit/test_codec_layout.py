import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from speechalign.codec.layout import FrameLayout
from speechalign.errors import MalformedCodes

LAYOUT = FrameLayout(first_id=100, num_codebooks=2, codebook_size=1024)


def test_the_example_of_the_docstring():
    ids_S = LAYOUT.flatten(np.array([[5, 6], [7, 8]]))
    assert ids_S.tolist() == [105, 1131, 106, 1132]


@given(st.data(), st.integers(1, 8), st.integers(0, 20), st.integers(2, 1024), st.integers(0, 99))
def test_unflatten_undoes_flatten(
    data: st.DataObject, num_codebooks: int, num_frames: int, codebook_size: int, first_id: int
):
    layout = FrameLayout(
        first_id=first_id, num_codebooks=num_codebooks, codebook_size=codebook_size
    )
    shape = (num_codebooks, num_frames)
    codes_KT = data.draw(arrays(np.int64, shape, elements=st.integers(0, codebook_size - 1)))
    ids_S = layout.flatten(codes_KT)
    assert ((ids_S >= first_id) & (ids_S < first_id + num_codebooks * codebook_size)).all()
    np.testing.assert_array_equal(layout.unflatten(ids_S), codes_KT)


@pytest.mark.parametrize("ids", [[105], [1131, 105], [99, 1131]])
def test_ids_that_are_not_frames_are_refused(ids: list[int]):
    with pytest.raises(MalformedCodes):
        LAYOUT.unflatten(np.array(ids))
