"""split_by_kind: the batch that packing each kind by itself gives, with the targets and pairs of the whole."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from dpofast import pack
from dpofast.packing.split import split_by_kind
from tests.support.histories import histories


def visible(batch, row):
    """Ids and positions of the rows that a packed row attends to."""
    rows = histories(batch.segments)[row]
    return batch.input_ids[rows].tolist(), batch.position_ids[rows].tolist()


@given(
    st.lists(st.tuples(st.integers(1, 4), st.lists(st.integers(1, 4), min_size=2, max_size=4)), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_every_target_is_predicted_from_the_same_tokens(groups, draw):
    examples = [
        {
            "prompt_ids": [100 + group] * prompt,
            "branches": [[10 * index + 1, *[2] * (length - 1)] for index, length in enumerate(responses)],
            "pairs": [(0, other) for other in range(1, len(responses))],
        }
        for group, (prompt, responses) in enumerate(groups)
    ]
    (batch,) = pack(examples)
    kinds = torch.tensor([draw.randrange(2) for _ in range(batch.num_sequences)])
    split = split_by_kind(batch, kinds)
    for before, after in zip(batch.logit_rows.tolist(), split.logit_rows.tolist(), strict=True):
        assert visible(split, after) == visible(batch, before)
    for one, other in zip(batch.padded(), split.padded(), strict=True):
        assert torch.equal(one, other)
    # a prompt for each kind of every group, and every response's own rows once
    size = sum(length - 1 for _, responses in groups for length in responses)
    bounds = iter(kinds.tolist())
    for prompt, responses in groups:
        size += prompt * len({next(bounds) for _ in responses})
    assert split.num_tokens == size
    assert int(split.segments.cu_seqlens_q[-1]) == size


def test_a_batch_of_one_kind_is_itself():
    (batch,) = pack([{"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]}])
    assert split_by_kind(batch, torch.zeros(2)) is batch
