"""The columns of pairs: numbers of rows and weights of tokens, in every form of input, and what is refused."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from dpofast.losses.columns import NO_COLUMNS
from dpofast.packing.collator import PackingCollator
from dpofast.packing.pack import pack
from dpofast.packing.split import split_by_kind
from tests.support.examples import DESIGN, example, group

COLUMNS = {
    "weight": [2.0, None, 0.5],
    "margin": [0.5, -1.0, None],
    "beta": [0.1, 0.2, 0.4],
    "label_smoothing": [0.0, 0.25, 0.5],
    "chosen_weights": [[0, 1], None, [1, 1]],
    "rejected_weights": [None, [2, 0.5], [3]],
}
ROWS = [
    row | {name: values[index] for name, values in COLUMNS.items()}
    for index, row in enumerate([DESIGN, example([5], [6], [7, 8]), example([10, 11, 12], [20, 21], [9])])
]


def parts(rows, name):
    """(values, offsets) of a column of lists."""
    lists = [row[name] for row in rows]
    return np.concatenate(lists), np.concatenate(([0], np.cumsum([len(one) for one in lists])))


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.targets, b.targets) and torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.pairs, b.pairs) and a.columns.given == b.columns.given
        for name in a.columns.given:
            left, right = getattr(a.columns, name), getattr(b.columns, name)
            assert left.dtype == right.dtype == torch.float32 and torch.equal(left, right)


def test_columns_follow_their_rows():
    (batch,) = pack(ROWS)
    assert batch.columns.given == ("weight", "margin", "beta", "label_smoothing", "token_weights")
    assert batch.pair_examples.tolist() == [0, 1, 2]
    assert batch.columns.weight.tolist() == [2, 1, 0.5] and batch.columns.margin.tolist() == [0.5, -1, 0]
    assert torch.equal(batch.columns.beta, torch.tensor([0.1, 0.2, 0.4]))
    assert torch.equal(batch.columns.label_smoothing, torch.tensor([0, 0.25, 0.5]))
    # Two variants of the response [20, 21], which share their position.
    assert batch.targets.tolist() == [20, 21, 30, 31, 32, 20, 21, 9, 6, 7, 8]
    assert batch.columns.token_weights.tolist() == [0, 1, 1, 1, 1, 1, 1, 3, 1, 2, 0.5]
    assert batch.pairs.tolist() == [[0, 1], [4, 5], [2, 3]]
    assert batch.num_tokens == (3 + 1 + 2) + (1 + 1)


def test_every_form_of_input_gives_the_same():
    expected, table = pack(ROWS, 6), pa.Table.from_pylist(ROWS)
    assert len(expected) == 2 and [len(batch.columns.weight) for batch in expected] == [2, 1]
    assert_same(pack(table, 6), expected)
    assert_same(pack(pa.concat_tables([table.slice(0, 2), table.slice(2)]), 6), expected)
    assert_same(pack(table.slice(1)), pack(ROWS[1:]))
    assert_same(pack(Dataset(table), 6), expected)
    assert_same(PackingCollator(6)(ROWS), expected)
    arrow = table.cast(pa.schema([pa.field(f.name, f.type) for f in table.schema]))
    for name, kind in (("weight", pa.float32()), ("beta", pa.float32())):
        arrow = arrow.set_column(arrow.schema.names.index(name), name, arrow[name].cast(kind))
    assert_same(pack(arrow, 6), expected)
    ids = {name: parts(ROWS, name) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    full = [row | {"rejected_weights": row["rejected_weights"] or [1, 1, 1]} for row in ROWS]
    full = [row | {"chosen_weights": row["chosen_weights"] or [1]} for row in full]
    weights = {name: parts(full, name) for name in ("chosen_weights", "rejected_weights")}
    numbers = {name: COLUMNS[name] for name in ("weight", "margin")}
    arrays = {name: np.array(COLUMNS[name]) for name in ("beta", "label_smoothing")}
    assert_same(pack(ids | weights | numbers | arrays, 6), expected)
    tensors = [row | {"weight": row["weight"] and torch.tensor(row["weight"])} for row in ROWS]
    assert_same(pack(tensors, 6), expected)


def test_without_columns_there_are_none():
    nothing = dict.fromkeys(COLUMNS)
    for rows in ([DESIGN], [DESIGN | nothing], pa.Table.from_pylist([DESIGN | nothing])):
        assert pack(rows)[0].columns == NO_COLUMNS
    ones = {"chosen_weights": [1, 1], "rejected_weights": [True, True, True]}
    assert pack([DESIGN | ones])[0].columns == NO_COLUMNS
    assert pack(pa.Table.from_pylist([DESIGN | ones]))[0].columns == NO_COLUMNS
    assert pack(pa.Table.from_pylist(ROWS).slice(0, 0)) == []


weights = st.none() | st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=2, max_size=2)


@given(st.lists(st.tuples(weights, weights, st.integers(0, 1)), min_size=1, max_size=8), st.integers(1, 40))
def test_every_response_keeps_its_weights_whatever_shares_its_positions(drawn, max_tokens):
    rows = [
        example([1], [2, 3 + other], [4, 5], chosen_weights=chosen, rejected_weights=rejected)
        for chosen, rejected, other in drawn
    ]
    for batch in pack(rows, max_tokens):
        sums = batch.columns.token_weights
        sums = torch.ones(batch.num_targets) if sums is None else sums
        of_sequence = [tuple(part.tolist()) for part in sums.split(batch.cu_targets.diff().tolist())]
        for index, pair in zip(batch.pair_examples.tolist(), batch.pairs.tolist(), strict=True):
            assert [of_sequence[s] for s in pair] == [tuple(one or (1, 1)) for one in drawn[index][:2]]
        assert len(set(zip(of_sequence, map(tuple, batch.targets.view(-1, 2).tolist()), strict=True))) == (
            batch.num_sequences
        )
        assert batch.num_tokens == 1 + len({2, 4})


def test_splitting_a_batch_keeps_its_columns():
    (batch,) = pack(ROWS)
    assert split_by_kind(batch, torch.arange(batch.num_sequences) % 2).columns is batch.columns


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": -0.5}, r"examples\[1\]: weight: expected a number that is 0 or more, got -0.5"),
        ({"beta": 0.0}, r"examples\[1\]: beta: expected a number that is above 0, got 0"),
        ({"beta": None}, r"examples\[1\]: no beta, unlike other examples; give it for every row or for none"),
        ({"label_smoothing": 1.0}, r"examples\[1\]: label_smoothing: expected a number that is in \[0, 1\), got 1"),
        ({"label_smoothing": None}, r"examples\[1\]: no label_smoothing, unlike other examples"),
        ({"margin": float("nan")}, r"examples\[1\]: margin: expected a number that is finite, got nan"),
        ({"margin": 1e39}, r"examples\[1\]: margin: expected a number that is finite, got 1e\+39"),
        (
            {"chosen_weights": [1, 1]},
            r"examples\[1\]: chosen_weights: expected 1 numbers, one a token of the .*, got 2",
        ),
        ({"chosen_weights": []}, r"examples\[1\]: chosen_weights: expected 1 numbers, .*, got 0"),
        ({"chosen_weights": [0.0]}, r"examples\[1\]: chosen_weights: all weights are 0; expected a token that counts"),
        ({"rejected_weights": [1.0, -2.0]}, r"examples\[1\]: rejected_weights\[1\]: expected a finite number of 0 or"),
        ({"rejected_weights": [float("nan"), 1.0]}, r"examples\[1\]: rejected_weights\[0\]: .* got nan"),
    ],
)
def test_a_bad_number_is_named_in_mappings_and_in_columns(given, message):
    rows = [ROWS[0], ROWS[1] | given, ROWS[2]]
    with pytest.raises(ValueError, match=message):
        pack(rows)
    with pytest.raises(ValueError, match=message):
        pack(pa.Table.from_pylist(rows))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([DESIGN | {"weight": "2"}], r"examples\[0\]: weight: expected numbers, got shape \(1,\) of <U1"),
        ([DESIGN | {"chosen_weights": 1.0}], r"examples\[0\]: chosen_weights: expected numbers, got shape \(\)"),
        ([DESIGN | {"chosen_weights": [[1], [2, 3]]}], r"examples\[0\]: chosen_weights: expected numbers; "),
        ([group([1], [[2], [3]], [(0, 1)], weight=1.0)], r"examples\[0\]: has weight beside branches, which may form"),
        ([example([1], [2, 3], [2, 3], chosen_weights=[1, 2])], "form a pair but are equal"),
    ],
)
def test_columns_that_cannot_be_read_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        pack(rows)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"weight": [1.0]}, "weight: expected 3 rows, one an example, got 1"),
        ({"chosen_weights": [[1], [2], [3]]}, r"chosen_weights: expected \(values, offsets\) or an Arrow list column"),
        ({"chosen_weights": ([1.0], [0, 1])}, "chosen_weights: expected 3 rows, one an example, got 1"),
        ({"chosen_weights": ([1.0], [0, 2, 1, 1])}, "chosen_weights offsets: expected them to ascend"),
        ({"chosen_weights": ([1.0], [0, 0, 0, 2])}, "chosen_weights offsets: .* to at most 1 values"),
        ({"chosen_weights": ([1.0], np.empty(0, np.int64))}, "chosen_weights offsets: expected them to ascend"),
    ],
)
def test_arrays_that_are_no_columns_are_refused(columns, message):
    ids = {name: parts(ROWS, name) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    with pytest.raises(ValueError, match=message):
        pack(ids | columns)
