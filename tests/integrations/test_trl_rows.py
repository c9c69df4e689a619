"""Padded rows to a packed batch and back, against the padded tensors themselves."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpofast.integrations._trl.rows import PaddedRows
from tests.support.histories import histories

CPU = torch.device("cpu")


def padded(rows):
    """input_ids, attention_mask and labelled mask of rows (ids, first label)."""
    width = max(len(ids) for ids, _ in rows)
    input_ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    labelled = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, (ids, first) in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = 1
        labelled[row, first : len(ids)] = True
    return input_ids, mask, labelled


@st.composite
def any_rows(draw):
    """A few tokens only, so that prompts, responses and whole rows coincide often."""
    ids = st.lists(st.integers(0, 2), min_size=1, max_size=5)
    rows = draw(st.lists(ids, min_size=2, max_size=6))
    return [(row, draw(st.integers(0, len(row)))) for row in rows]


def seen_by(packed, row):
    """The tokens that packed row `row` sees, its own last: what a causal model computes there."""
    return packed.batch.input_ids[histories(packed.batch.segments)[row]].tolist()


def two_kinds(lengths):
    """Short and long ones."""
    return (lengths > 3).long()


@given(any_rows(), st.booleans(), st.sampled_from([None, two_kinds]))
def test_every_label_is_predicted_from_its_own_row(rows, every_token, kinds):
    input_ids, mask, labelled = padded(rows)
    padded_rows = PaddedRows.from_tensors(input_ids, mask, labelled)
    packed = padded_rows.packed(CPU, every_token=every_token, kinds=kinds)
    labelled[:, 0] = False
    labelled &= mask != 0
    assert padded_rows.num_labels == int(labelled.sum())
    if packed is None:
        assert padded_rows.num_labels == 0
        return
    width = input_ids.shape[1]
    assert packed.cells.tolist() == labelled[:, 1:].flatten().nonzero().squeeze(1).tolist()
    for cell, source in zip(packed.cells.tolist(), packed.source.tolist(), strict=True):
        row, position = divmod(cell, width - 1)
        assert packed.targets[source] == input_ids[row, position + 1]
        assert seen_by(packed, int(packed.logit_rows[source])) == input_ids[row, : position + 1].tolist()
    if every_token:
        attended = iter(packed.attended.tolist())
        for ids, _ in rows:
            for position in range(len(ids)):
                assert seen_by(packed, next(attended)) == ids[: position + 1]
        assert next(attended, None) is None
    if kinds is None:
        # one packed row for what any number of rows begin with; a last token has one where all tokens have
        computed = [ids if every_token else ids[:-1] for ids, first in rows if every_token or max(first, 1) < len(ids)]
        assert packed.batch.num_tokens == len({tuple(ids[: i + 1]) for ids in computed for i in range(len(ids))})


def test_shared_prompts_and_equal_rows_are_computed_once():
    rows = PaddedRows.from_tensors(*padded([([5, 6, 7, 8], 2), ([5, 6, 7, 8], 2), ([5, 6, 9], 2), ([4, 6, 9], 2)]))
    packed = rows.packed(CPU)
    assert packed.batch.num_tokens == 3 + 0 + 2 and len(packed.targets) == 4
    assert rows.unshared_pairs() == 1
    assert rows.packed(CPU) is packed  # kept for the reference's forward


def test_rows_travel_to_another_process():
    rows = pickle.loads(pickle.dumps(PaddedRows.from_tensors(*padded([([5, 6, 7], 1), ([5, 8], 1)]))))
    assert rows.packed(CPU).targets.tolist() == [6, 7, 8]
    assert not hasattr(rows, "to")
    assert np.array_equal(rows.cells(), [0, 1, 2])


def test_what_cannot_be_read_is_refused():
    input_ids, mask, labelled = padded([([5, 6, 7], 1), ([5, 8], 1)])
    with pytest.raises(ValueError, match="expected equal shapes"):
        PaddedRows.from_tensors(input_ids, mask[:, :2], labelled)
    with pytest.raises(ValueError, match="padded on the right"):
        PaddedRows.from_tensors(input_ids, mask.flip(1), labelled)
    with pytest.raises(ValueError, match="at least one token"):
        PaddedRows.from_tensors(input_ids, torch.zeros_like(mask), labelled)
    with pytest.raises(ValueError, match="padded on the right"):
        PaddedRows.from_tensors(input_ids, torch.tensor([[1, 0, 1], [1, 1, 0]]), labelled)


def test_rows_hold_memory_of_their_own():
    input_ids, mask, labelled = padded([([5, 6, 7], 1), ([5, 6], 1)])
    rows = PaddedRows.from_tensors(input_ids, mask, labelled)
    for tensor in (input_ids, mask, labelled):
        tensor.zero_()
    assert [row.tolist() for row in rows.ids] == [[5, 6, 7], [5, 6]]
    assert [row.tolist() for row in rows.labels] == [[1, 2], [1]]
