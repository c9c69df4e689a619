"""The planner: every item once, budgets, lower bounds, ranks, and errors."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpofast.packing.planner import plan


def rank_loads(made):
    """(R,) the summed lengths of each rank."""
    return np.array([made.loads[start:stop].sum() for start, stop in pairwise(made.rank_bounds)])


def test_plan_reaches_the_lower_bound_on_realistic_lengths():
    rng = np.random.default_rng(0)
    for size in (64, 256, 1000):
        lengths = np.clip(rng.lognormal(5.5, 0.7, size), 8, 2048).astype(np.int64)
        result = plan(lengths, 8192)
        assert len(result.loads) == -(-lengths.sum() // 8192)
        assert result.oversized == 0


@given(st.lists(st.integers(1, 50)), st.integers(1, 60), st.randoms(use_true_random=False))
def test_plan(lengths, max_tokens, rng):
    result = plan(lengths, max_tokens)
    assert sorted(i for batch in result.micro_batches for i in batch) == list(range(len(lengths)))
    assert result.loads.tolist() == [sum(lengths[i] for i in batch) for batch in result.micro_batches]
    assert result.loads.tolist() == sorted(result.loads.tolist(), reverse=True)
    assert result.oversized == sum(length > max_tokens for length in lengths)
    for batch, load in zip(result.micro_batches, result.loads, strict=True):
        assert load <= max_tokens or len(batch) == 1
        assert batch.tolist() == sorted(batch.tolist())
    # No two batches could have been one.
    assert all(a + b > max_tokens for a, b in zip(result.loads, result.loads[1:], strict=False))
    assert plan(rng.sample(lengths, len(lengths)), max_tokens).loads.tolist() == result.loads.tolist()


def test_a_short_tail_is_shared_out():
    assert plan([268] * 8, 2000).loads.tolist() == [1072, 1072]  # best-fit decreasing: 1876 + 268
    assert plan([9, 5, 5, 4, 3, 3, 2, 1], 17).loads.tolist() == [16, 16]
    assert plan([50, 9, 1, 1], 10).loads.tolist() == [50, 9, 2]  # what is too long stays alone
    rng = np.random.default_rng(0)
    for size in (64, 128, 512):
        lengths = np.clip(rng.lognormal(5.5, 0.7, size), 8, 2048).astype(np.int64)
        loads = plan(lengths, 4096).loads
        assert len(loads) == -(-lengths.sum() // 4096)
        assert loads.max() <= 1.01 * loads.mean()


# Tokens and targets, so that each of them binds in some of the cases.
items = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), max_size=40)


@given(items, st.integers(1, 80), st.none() | st.integers(1, 80), st.integers(1, 5), st.booleans())
def test_plan_over_ranks(items, max_tokens, max_targets, num_ranks, equal_counts):
    lengths, targets = ([item[k] for item in items] for k in (0, 1))
    made = plan(
        lengths,
        max_tokens,
        num_ranks=num_ranks,
        equal_counts=equal_counts,
        targets=None if max_targets is None else targets,
        max_targets=max_targets,
    )
    by_rank = [made.of_rank(rank) for rank in range(num_ranks)]
    assert [batch.tolist() for rank in by_rank for batch in rank] == [b.tolist() for b in made.micro_batches]
    assert sorted(i for batch in made.micro_batches for i in batch) == list(range(len(items)))
    assert rank_loads(made).tolist() == [sum(lengths[i] for batch in rank for i in batch) for rank in by_rank]
    for batch in made.micro_batches:
        assert len(batch) == 1 or sum(lengths[i] for i in batch) <= max_tokens
        assert len(batch) == 1 or max_targets is None or sum(targets[i] for i in batch) <= max_targets
    for rank in by_rank:
        loads = [sum(lengths[i] for i in batch) for batch in rank]
        assert loads == sorted(loads, reverse=True)
        # Empty only where a rank has fewer items than micro-batches.
        assert all(len(batch) for batch in rank) or (equal_counts and all(len(batch) <= 1 for batch in rank))
    if equal_counts:
        assert len({len(rank) for rank in by_rank}) == 1
    beyond = sum(a > max_tokens or (max_targets is not None and b > max_targets) for a, b in items)
    assert made.oversized == beyond


def test_ranks_are_balanced_and_reach_the_lower_bound():
    rng = np.random.default_rng(0)
    for size in (256, 512):
        lengths = np.clip(rng.lognormal(6.5, 0.7, size), 8, 4096).astype(np.int64)
        made = plan(lengths, 16384, num_ranks=8, equal_counts=True)
        assert rank_loads(made).max() <= 1.001 * rank_loads(made).mean()
        assert len(made.loads) == 8 * -(-lengths.sum() // (8 * 16384))


def test_an_epoch_reaches_the_lower_bound():
    lengths = np.clip(np.random.default_rng(0).lognormal(6.5, 0.7, 100_000), 8, 4096).astype(np.int64)
    made = plan(lengths, 16384)
    assert len(made.loads) == -(-lengths.sum() // 16384)
    assert made.loads.max() <= 16384
    assert np.array_equal(np.sort(made.items), np.arange(len(lengths)))
    # One length leaves no choice, and lengths above half of the budget none either.
    assert len(plan(np.full(10_000, 5000), 16384).loads) == 3334
    assert len(plan(np.full(9_000, 8193), 16384).loads) == 9_000


@pytest.mark.parametrize("size", [512, 20_000])
def test_two_budgets_stay_near_the_lower_bound(size):
    rng = np.random.default_rng(0)
    prompts, responses = (np.clip(rng.lognormal(mean, 1, size), 4, 4096).astype(np.int64) for mean in (5, 6))
    for max_targets in (9000, 12_800):  # of which either, or both, bind
        made = plan(prompts + responses, 16384, targets=responses, max_targets=max_targets)
        bound = max(-(-(prompts + responses).sum() // 16384), -(-responses.sum() // max_targets))
        assert len(made.loads) <= 1.03 * bound + 1


def test_more_is_tried_where_best_fit_misses_the_lower_bound():
    assert plan([4, 4, 3, 3, 3, 3], 10).loads.tolist() == [10, 10]
    assert plan([7, 6, 5, 4, 3, 2, 2, 1], 10).loads.tolist() == [10, 10, 10]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_ranks": 0}, "num_ranks: expected an integer in"),
        ({"num_ranks": 2.0}, "num_ranks: expected an integer in"),
        ({"max_tokens": 0}, "max_tokens: expected None or an integer in"),
        ({"targets": [1, 1]}, "targets, max_targets: expected both or neither"),
        ({"max_targets": 4}, "targets, max_targets: expected both or neither"),
        ({"targets": [1], "max_targets": 4}, "targets: expected 2 integers, one a length, got 1"),
        ({"targets": [1, 0], "max_targets": 4}, r"targets\[1\] is 0; expected 1 to"),
        ({"targets": [1, 2], "max_targets": 0}, "max_targets: expected None or an integer in"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        plan([1, 2], **options)


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_that_is_none(rank):
    with pytest.raises(ValueError, match="rank: expected 0 to 1, got"):
        plan([1, 2], num_ranks=2).of_rank(rank)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([3, 0], r"lengths\[1\] is 0; expected 1 to 2147483647"),
        ([-1], r"lengths\[0\] is -1"),
        ([2**31], r"lengths\[0\] is 2147483648"),
        ([2**30, 2**30], r"would hold 2147483648 tokens .* int32 .*: give a smaller max_tokens"),
        ([[1, 2]], r"lengths: expected integers, a 1-D array or list, got shape \(1, 2\)"),
        ([1.0], r"lengths: expected integers, .* of float64"),
    ],
)
def test_bad_lengths(lengths, message):
    with pytest.raises(ValueError, match=message):
        plan(lengths)


def test_plan_splits_what_int32_cannot_hold():
    assert plan([2**30] * 3, 2**31 - 1).loads.tolist() == [2**30] * 3
    assert plan([]).micro_batches == []
