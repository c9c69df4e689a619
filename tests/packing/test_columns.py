"""Examples by columns (numpy, Arrow, Dataset): the same batches as by rows, token data in place, and errors."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from dpofast import _C
from dpofast.packing.examples import read_examples
from dpofast.packing.pack import pack

NAMES = ("prompt_ids", "chosen_ids", "rejected_ids")
ROWS = [
    {"prompt_ids": [10, 11, 12], "chosen_ids": [20, 21], "rejected_ids": [30, 31, 32]},
    {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7, 8]},
    {"prompt_ids": [10, 11, 12], "chosen_ids": [20, 21], "rejected_ids": [9]},
]
REFS = {"ref_chosen_logps": [-1.0, -2.0, -1.0], "ref_rejected_logps": [-4.0, -5.0, -6.0]}


def columns(rows, dtype=np.int64, offset_dtype=np.int64, before=0):
    """(values, offsets) of each column, with so many foreign values before the first row."""
    result = {}
    for name in NAMES:
        ids = [row[name] for row in rows]
        values = np.concatenate([np.full(before, -1), *ids]).astype(dtype)
        offsets = before + np.concatenate(([0], np.cumsum([len(row) for row in ids])))
        result[name] = (values, offsets.astype(offset_dtype))
    return result


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        for name in ("input_ids", "position_ids", "logit_rows", "targets", "cu_targets", "pairs", "pair_examples"):
            assert torch.equal(getattr(a, name), getattr(b, name))
        assert torch.equal(a.segments.cu_seqlens_q, b.segments.cu_seqlens_q)
        assert torch.equal(a.segments.parents, b.segments.parents)
        assert a.padded_tokens == b.padded_tokens
        assert (a.ref_logps is None) == (b.ref_logps is None)
        assert a.ref_logps is None or torch.equal(a.ref_logps, b.ref_logps)


ids = st.lists(st.integers(0, 2), min_size=1, max_size=5)
distinct = st.tuples(ids, ids, ids).filter(lambda three: three[1] != three[2])
pairs = distinct.map(lambda three: dict(zip(NAMES, three, strict=True)))


@given(st.lists(pairs, min_size=1, max_size=10), st.none() | st.integers(1, 30), st.integers(0, 3))
def test_columns_are_rows(rows, max_tokens, before):
    expected = pack(rows, max_tokens)
    for dtype in (np.int32, np.int64, np.uint16):
        for offset_dtype in (np.int32, np.int64):
            assert_same(pack(columns(rows, dtype, offset_dtype, before), max_tokens), expected)


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list])
@pytest.mark.parametrize("value_type", [pa.int64(), pa.int32(), pa.uint16()])
def test_arrow_tables_are_rows(kind, value_type):
    arrays = {name: pa.array([row[name] for row in ROWS], kind(value_type)) for name in NAMES}
    table = pa.table(arrays | REFS)
    expected = pack([row | {name: values[i] for name, values in REFS.items()} for i, row in enumerate(ROWS)])
    assert_same(pack(table), expected)
    assert_same(pack(table.to_batches()[0]), expected)
    # Slices, chunks that differ between the columns, other columns, and no reference log-probs.
    parts = pa.concat_tables([table.slice(0, 1), table.slice(1, 2)])
    assert_same(pack(parts), expected)
    mixed = pa.table({"x": [1, 2, 3], "prompt_ids": parts["prompt_ids"]} | {name: table[name] for name in NAMES[1:]})
    assert_same(pack(mixed), pack(ROWS))
    assert_same(pack(table.select(NAMES).slice(1, 1)), pack(ROWS[1:2]))
    assert pack(table.slice(0, 0)) == []


def test_other_list_types_and_nulls_beside_the_rows():
    fixed = pa.table({name: pa.array([[1, 2], [3, k]], pa.list_(pa.int64(), 2)) for k, name in enumerate(NAMES)})
    with pytest.raises(ValueError, match=r"examples\[0\]: chosen_ids and rejected_ids form a pair but are equal"):
        pack(fixed)
    assert pack(fixed.slice(1))[0].input_ids.tolist() == [3, 0, 3]  # the responses begin alike
    table = pa.table({name: pa.array([[None], [3, k]]) for k, name in enumerate(NAMES)})
    assert pack(table.slice(1))[0].input_ids.tolist() == [3, 0, 3]  # the responses begin alike


def test_a_dataset_is_read_by_columns():
    dataset = Dataset.from_list([row | {"text": "x"} for row in ROWS])
    assert_same(pack(dataset), pack(ROWS))
    assert_same(pack(dataset.with_format("numpy").select([2, 1])), pack([ROWS[2], ROWS[1]]))


def test_a_table_of_groups_is_read_by_rows():
    group = {"prompt_ids": [1], "branches": [[2], [3, 4]], "pairs": [[0, 1]]}
    assert_same(pack(pa.Table.from_pylist([group])), pack([group]))


def test_token_data_is_read_in_place():
    table = columns(ROWS, np.int32)
    flat = read_examples(table)
    packer = flat.packer(max_tokens=100, max_targets=100, share="prompt")
    table["prompt_ids"][0][:] += 100
    assert len(flat.sequences) == 9 and flat.sequences.lengths().tolist() == [3, 2, 3, 1, 1, 2, 3, 2, 1]
    longs, ints = np.empty(100, np.int64), np.empty(100, np.int32)
    packer.fill(longs, ints, 1)
    assert longs[:3].tolist() == [110, 111, 112]


def bad(name, values=None, offsets=None):
    table = columns(ROWS)
    old = table[name]
    return table | {name: (old[0] if values is None else values, old[1] if offsets is None else offsets)}


def arrow(**changes):
    return pa.table({name: pa.array([row[name] for row in ROWS]) for name in NAMES} | changes)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"prompt_ids": ([1], [0, 1])}, "the columns chosen_ids, rejected_ids are missing; .* got prompt_ids"),
        (bad("chosen_ids", offsets=[0, 2, 1, 4]), r"examples\[1\]: offsets go from 2 to 1; expected them to ascend"),
        (bad("chosen_ids", offsets=[0, 2, 3, 99]), r"examples\[2\]: offsets go from 3 to 99; .* within 5 values"),
        (bad("chosen_ids", offsets=[-1, 2, 3, 4]), r"examples\[0\]: offsets start at -1; expected 0 or more"),
        (bad("chosen_ids", offsets=[0, 2, 2**62, 4]), r"examples\[1\]: offsets go from 2 to 4611686018427387904"),
        (bad("chosen_ids", offsets=[0, 2, 2, 4]), r"examples\[1\]: chosen_ids is empty"),
        (bad("chosen_ids", offsets=[0, 2, 3]), "columns differ in length"),
        (bad("chosen_ids", offsets=np.empty(0, np.int64)), "chosen_ids offsets: expected one more than"),
        (bad("chosen_ids", values=[20, 21, 6, 20, -3]), r"examples\[2\]: chosen_ids\[1\] is -3; expected a token id"),
        (bad("rejected_ids", values=[30, 31, 32, 7, 100, 9]), r"examples\[1\]: rejected_ids\[1\] is 100; .* below"),
        (bad("chosen_ids", values=np.ones(5)), "chosen_ids values: expected integers, .* of float64"),
        (bad("chosen_ids", values=np.ones((5, 1), np.int64)), "chosen_ids values: expected integers, .*shape"),
        (columns(ROWS) | {"chosen_ids": [[1], [2], [3]]}, r"chosen_ids: expected \(values, offsets\) or an Arrow list"),
        (arrow(chosen_ids=pa.array([1, 2, 3])), "chosen_ids: expected lists of integers, got int64"),
        (arrow(chosen_ids=pa.array([[1.0], [2.0], [3.0]])), "chosen_ids: expected lists of integers, got lists of"),
        (arrow(chosen_ids=pa.array([[1], None, [3]])), r"examples\[1\]: chosen_ids is null"),
        (arrow(chosen_ids=pa.chunked_array([[[1], [2]], [None]])), r"examples\[2\]: chosen_ids is null"),
        (arrow(chosen_ids=pa.array([[1], [2, None], [3]])), r"examples\[1\]: chosen_ids holds a null"),
        (arrow(ref_chosen_logps=[1.0, 2.0, 3.0]), "ref_rejected_logps: expected 3 floats beside ref_chosen_logps"),
        (arrow(**REFS | {"ref_chosen_logps": [1.0, np.nan, 1.0]}), r"examples\[1\]: ref_chosen_logps: expected a"),
        (columns(ROWS) | REFS | {"ref_chosen_logps": [1.0]}, r"ref_chosen_logps: expected 3 floats, .* shape \(1,\)"),
    ],
)
def test_a_bad_column_is_named(table, message):
    with pytest.raises(ValueError, match=message):
        pack(table, vocab_size=100)


@pytest.mark.parametrize(
    "chunk",
    [
        (np.ones(1), np.ones(2, np.int64)),
        (np.ones(1, np.int64), np.empty(0, np.int64)),
        (np.ones((1, 1), np.int64), np.ones((1, 1), np.int64)),
        (np.ones(1, np.int64),),
    ],
)
def test_the_extension_refuses_other_chunks(chunk):
    with pytest.raises(TypeError, match="a chunk is"):
        _C.Sequences.from_columns([[chunk]])


def test_the_extension_refuses_what_convert_must_not_return():
    with pytest.raises(TypeError, match="convert must return"):
        _C.Sequences.from_objects([object()], lambda index: np.ones(1))
    # A list that convert shortens or extends is read as it is then.
    growing = [1]
    sequences = _C.Sequences.from_objects([None, growing], lambda index: (growing.extend([2] * 9), np.arange(3))[1])
    assert sequences.lengths().tolist() in ([3, 10], [3, 3])


def test_ids_beyond_any_vocabulary_are_refused():
    with pytest.raises(ValueError, match=r"rejected_ids\[0\] is 2147483648; expected a token id .* below 2\*\*31"):
        pack([ROWS[0] | {"rejected_ids": [2**31]}])
    assert int(pack([ROWS[0] | {"rejected_ids": [2**31 - 1]}])[0].targets.max()) == 2**31 - 1


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (pd.DataFrame([ROWS[0]]), "got DataFrame: pass pyarrow.Table.from_pandas"),
        (Dataset.from_list([ROWS[0]]).to_iterable_dataset(), "got IterableDataset: pass a list of its rows"),
        (DatasetDict(train=Dataset.from_list([ROWS[0]])), "got DatasetDict: choose one of its splits"),
        ("abc", "got str: pass a list of mappings"),
        (None, "got NoneType: pass a list of mappings"),
    ],
    ids=["DataFrame", "IterableDataset", "DatasetDict", "str", "None"],
)
def test_other_containers_are_refused_with_the_way_on(examples, message):
    with pytest.raises(ValueError, match=f"examples: expected mappings, .*{message}"):
        pack(examples)


def test_a_dataset_is_packed_as_it_shows_itself():
    rows = Dataset.from_list([{"prompt_ids": [3], "chosen_ids": [4], "rejected_ids": [5], "ref_chosen_logps": -1.0}])
    shown = rows.with_transform(lambda batch: {**batch, "chosen_ids": [[7, 8]], "ref_chosen_logps": [None]})
    (batch,) = pack(shown)
    assert batch.targets.tolist() == [7, 8, 5]
    with pytest.raises(ValueError, match="ref_rejected_logps: expected 1 floats beside ref_chosen_logps"):
        pack(rows)
    (batch,) = pack(rows.with_format("numpy", columns=["prompt_ids", "chosen_ids", "rejected_ids"]))
    assert batch.ref_logps is None
