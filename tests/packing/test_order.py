"""lexicographic_order: rows of a column of token ids, sorted as Python sorts lists."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpofast import _C
from dpofast.packing.examples import lexicographic_order

TOKENS = st.one_of(st.integers(0, 2), st.integers(0, 2**31 - 1))
ROWS = st.lists(st.lists(TOKENS, max_size=6), max_size=30)


@given(ROWS, st.integers(0, 30), st.sampled_from([pa.int32(), pa.int64(), pa.uint32()]))
def test_rows_are_sorted_as_python_sorts_lists_and_equal_ones_keep_their_order(rows, cut, dtype):
    chunks = [pa.array(part, pa.list_(dtype)) for part in (rows[:cut], rows[cut:])]
    found = lexicographic_order(pa.chunked_array(chunks), "ids")
    assert found.dtype == np.int64
    assert found.tolist() == sorted(range(len(rows)), key=lambda row: rows[row])


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.integers(0, 70))
def test_rows_that_part_late_are_sorted_by_what_comes_after_the_common_beginning(ends, common):
    column = pa.chunked_array([pa.array([[7] * common + [end] for end in ends], pa.list_(pa.int32()))])
    assert lexicographic_order(column, "ids").tolist() == np.argsort(ends, kind="stable").tolist()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (pa.array([[1], [2, -1]]), r"examples\[1\]: expected token ids that are not negative and below 2\*\*31"),
        (pa.array([[1, 2**31]]), r"examples\[0\]: expected token ids that are not negative and below 2\*\*31"),
        (pa.array([[1], None]), r"examples\[1\]: ids is null; expected token ids"),
        (pa.array([[0.5]]), "ids: expected lists of integers, got lists of double"),
    ],
)
def test_what_is_no_list_of_token_ids_is_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        lexicographic_order(pa.chunked_array([rows]), "ids")


def test_the_extension_takes_sequences_only():
    with pytest.raises(TypeError):
        _C.lexicographic_order(None)
