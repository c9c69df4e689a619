"""split_by_kind: the batch that packing each kind by itself gives, with the targets and pairs of the whole."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from dpofast import pack
from dpofast.packing.split import split_by_kind
from tests.support.deep_examples import tries
from tests.support.histories import histories
from tests.support.tries import unpadded


def visible(batch, row):
    """Ids and positions of the rows that a packed row attends to."""
    rows = histories(batch.segments)[row]
    return batch.input_ids[rows].tolist(), batch.position_ids[rows].tolist()


@given(tries(), st.randoms(use_true_random=False))
def test_every_target_is_predicted_from_the_same_tokens(examples, draw):
    (batch,) = pack(examples)
    kinds = torch.tensor([draw.randrange(3) for _ in range(batch.num_sequences)])
    split = split_by_kind(batch, kinds)
    for before, after in zip(batch.logit_rows.tolist(), split.logit_rows.tolist(), strict=True):
        assert visible(split, after) == visible(batch, before)
    for one, other in zip(batch.padded(), split.padded(), strict=True):
        assert torch.equal(one, other)
    # one row for each distinct beginning of the sequences of a kind
    paths = {
        (kind, (*prompt, *response[:-1]))
        for kind, (prompt, response) in zip(kinds.tolist(), unpadded(batch), strict=True)
    }
    beginnings = {(kind, path[:length]) for kind, path in paths for length in range(1, len(path) + 1)}
    assert split.num_tokens == split.segments.num_rows == len(beginnings)
    # and none of another kind
    used = {}
    for kind, row in zip(
        kinds.repeat_interleave(batch.cu_targets.diff()).tolist(), split.logit_rows.tolist(), strict=True
    ):
        assert all(used.setdefault(seen, kind) == kind for seen in histories(split.segments)[row])


def test_a_batch_of_one_kind_is_itself():
    (batch,) = pack([{"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]}])
    assert split_by_kind(batch, torch.zeros(2)) is batch
