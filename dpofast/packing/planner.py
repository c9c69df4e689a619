"""plan: assigns items to micro-batches and micro-batches to ranks, by their lengths alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dpofast import _C
from dpofast.packing.arguments import at_least_one, integers, limit


@dataclass(frozen=True, eq=False)
class Plan:
    """n items assigned to M micro-batches of R ranks, numbered rank by rank and, within a rank, by descending load.

    Attributes:
        items: (n,) int64, item indices, micro-batch after micro-batch, ascending inside each.
        bounds: (M + 1,) int64; micro-batch m holds items[bounds[m]:bounds[m + 1]].
        loads: (M,) int64, the summed lengths of each micro-batch.
        rank_bounds: (R + 1,) int64; rank r runs micro-batches rank_bounds[r] to rank_bounds[r + 1] - 1.
        oversized: how many items are beyond max_tokens or max_targets; each is alone in its micro-batch.
    """

    items: np.ndarray
    bounds: np.ndarray
    loads: np.ndarray
    rank_bounds: np.ndarray
    oversized: int

    @cached_property
    def micro_batches(self) -> list[np.ndarray]:
        """The item indices of every micro-batch, as views of items."""
        bounds = self.bounds.tolist()
        return [self.items[start:stop] for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]

    def of_rank(self, rank: int) -> list[np.ndarray]:
        """The micro-batches of one rank.

        Raises:
            ValueError: a rank outside [0, R).
        """
        if not 0 <= rank < len(self.rank_bounds) - 1:
            raise ValueError(f"rank: expected 0 to {len(self.rank_bounds) - 2}, got {rank}")
        return self.micro_batches[self.rank_bounds[rank] : self.rank_bounds[rank + 1]]


def plan(
    lengths: Sequence[int] | np.ndarray,
    max_tokens: int | None = None,
    *,
    num_ranks: int = 1,
    equal_counts: bool = False,
    targets: Sequence[int] | np.ndarray | None = None,
    max_targets: int | None = None,
) -> Plan:
    """Assigns items of given lengths to ranks, and to as few micro-batches of max_tokens as it finds.

    Items go to the ranks so that their sums of lengths are even. A rank's share is packed best-fit decreasing. Up to
    8,192 items of a rank (an optimizer step) are then packed into fewer micro-batches where a lower bound allows it
    and another way finds it (longest first with exchanges, or each micro-batch filled by the best subset), and spread
    evenly: the largest load falls, the count stays. Deterministic; the loads depend on the lengths alone, not on their
    order. O(n log n).

    Args:
        lengths: (n,) integers, packed tokens of each item; 1 or more.
        max_tokens: the budget of a micro-batch; None puts everything of a rank into one.
        num_ranks: the number of ranks, 1 or more.
        equal_counts: give every rank as many micro-batches as the rank that needs most (FSDP's collectives want that).
            One is empty only where a rank has fewer items than micro-batches.
        targets: (n,) integers, response tokens of each item; 1 or more. Given with max_targets.
        max_targets: a second budget of a micro-batch, which bounds the memory of the head.

    Raises:
        ValueError: if lengths or targets is not a 1-D integer array of values in [1, 2**31), if they differ in length,
            if only one of targets and max_targets is given, if max_tokens, max_targets or num_ranks is below 1, or if a
            micro-batch would pass int32 positions.
    """
    token_limit, target_limit = limit("max_tokens", max_tokens), limit("max_targets", max_targets)
    if (targets is None) != (max_targets is None):
        raise ValueError("targets, max_targets: expected both or neither")
    ranks = at_least_one("num_ranks", num_ranks)
    sizes = integers(lengths, "lengths").astype(np.int64, copy=False)
    too_long = sizes > token_limit
    target_sizes = None
    if targets is not None:
        target_sizes = integers(targets, "targets").astype(np.int64, copy=False)
        if len(target_sizes) != len(sizes):
            raise ValueError(f"targets: expected {len(sizes)} integers, one a length, got {len(target_sizes)}")
        too_long |= target_sizes > target_limit
    items, bounds, loads, rank_bounds = _C.plan(
        np.ascontiguousarray(sizes), target_sizes, token_limit, target_limit, ranks, equal_counts
    )
    return Plan(items=items, bounds=bounds, loads=loads, rank_bounds=rank_bounds, oversized=int(too_long.sum()))
