"""RowSplit: every row and target belongs to one rank, and gathered values come back in the batch's order."""

import pytest
import torch

from dpofast.packing.pack import pack
from dpofast.packing.parallel.row_split import RowSplit
from tests.support.tiny import tiny_dialogues


class Group:
    """What RowSplit asks a process group."""

    def __init__(self, size, rank):
        self.size, self.rank = (lambda: size), (lambda: rank)


def splits(batch, size):
    return [batch.split_over(Group(size, rank)).split for rank in range(size)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_each_row_and_target_is_computed_by_one_rank(size):
    (batch,) = pack(tiny_dialogues(5))
    parts = splits(batch, size)
    rows = torch.stack([part.rows for part in parts], dim=1).flatten()
    assert rows[: batch.num_tokens].tolist() == list(range(batch.num_tokens))
    assert (rows[batch.num_tokens :] == 0).all() and len(rows) - batch.num_tokens < size
    targets = torch.cat([part.targets for part in parts])
    assert sorted(targets.tolist()) == list(range(batch.num_targets))
    for part in parts:
        assert torch.equal(part.rows[part.logit_rows], batch.logit_rows[part.targets])


@pytest.mark.parametrize("size", [2, 3, 4])
def test_gathered_values_are_in_the_order_of_the_targets(size):
    (batch,) = pack(tiny_dialogues(5))
    parts = splits(batch, size)
    values = torch.randn(batch.num_targets)
    table = torch.cat([part.padded(values[part.targets]) for part in parts])
    for part in parts:
        assert len(table) == size * part.most
        assert torch.equal(table[part.gathered], values)


def test_more_ranks_than_rows():
    split = RowSplit.of(2, torch.tensor([1, 1]), Group(4, 3))
    assert split.rows.tolist() == [0] and len(split.targets) == 0 and split.most == 2


def test_a_batch_is_split_before_it_is_moved():
    (batch,) = pack(tiny_dialogues(2))
    with pytest.raises(ValueError, match="expected a batch on the CPU, got one on meta"):
        batch.to("meta").split_over(Group(2, 0))
