"""A batch whose rows are split over ranks: log-probs, losses and summed gradients are those of one process."""

import functools

import pytest
import torch

from tests.support.rank_processes import free_port, run_ranks
from tests.support.sequence_parallel_cases import CASES, FEW, rank_main, run

WORLDS = [(2, FEW), (4, CASES)]


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    """(world, names) -> what every rank has computed, by case; one start of ranks for all cases."""

    @functools.cache
    def values(world, names):
        folder = tmp_path_factory.mktemp(f"ranks{world}")
        run_ranks(rank_main, (free_port(), str(folder), world, names), world)
        return [torch.load(folder / f"{rank}.pt") for rank in range(world)]

    return values


def check(name, ranks):
    """Values of every rank equal those of one process, and the sum of gradients does."""
    one = run(**CASES[name])
    assert all(set(rank[name]) == set(one) for rank in ranks)
    for key, value in one.items():
        theirs = [rank[name][key] for rank in ranks]
        if key.startswith("grad "):
            theirs = [torch.stack(theirs).sum(0)]
        for their in theirs:
            torch.testing.assert_close(their, value, atol=1e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.slow(30)
@pytest.mark.parametrize("name", FEW)
def test_two_ranks_compute_what_one_process_does(name, on_ranks):
    check(name, on_ranks(2, FEW))


@pytest.mark.ranks
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_ranks_compute_what_one_process_does(name, world, on_ranks):
    check(name, on_ranks(world, tuple(CASES)))
