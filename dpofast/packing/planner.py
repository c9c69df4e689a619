"""plan: assigns items to micro-batches and micro-batches to ranks, based on their lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dpofast import _C
from dpofast.packing.arguments import at_least_one, integers, limit


@dataclass(frozen=True, eq=False)
class Plan:
    """Assignment of n items to M micro-batches on R ranks, ordered by rank and, within a rank, by descending load.

    Attributes:
        items: (n,) int64, item indices grouped by micro-batch, ascending within each.
        bounds: (M + 1,) int64; micro-batch m holds items[bounds[m]:bounds[m + 1]].
        loads: (M,) int64, the sum of lengths of each micro-batch.
        rank_bounds: (R + 1,) int64; rank r runs micro-batches rank_bounds[r] to rank_bounds[r + 1] - 1.
        oversized: number of items that exceed max_tokens or max_targets; each has a micro-batch of its own.
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
            ValueError: rank is outside [0, R).
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
    """Assign items of given lengths to ranks, and on each rank to few micro-batches of at most max_tokens.

    Items are distributed so that every rank's sum of lengths is about equal. Each rank's items are packed best-fit
    decreasing. For up to 8,192 items per rank (an optimizer step), two further algorithms (longest first with
    exchanges; filling each micro-batch with the best subset) try to use fewer micro-batches if a lower bound allows it,
    and the items are then rebalanced to lower the largest load at the same count. Deterministic; the loads depend on
    the lengths only, not on their order. O(n log n).

    Args:
        lengths: (n,) integers, packed tokens of each item; 1 or more.
        max_tokens: most tokens of a micro-batch; None puts all items of a rank into one.
        num_ranks: the number of ranks, 1 or more.
        equal_counts: give every rank as many micro-batches as the rank that needs most (FSDP's collectives require it).
            A micro-batch is empty only if its rank has fewer items than micro-batches.
        targets: (n,) integers, response tokens of each item; 1 or more. Required with max_targets.
        max_targets: most response tokens of a micro-batch, which bounds the memory of the LM head.

    Returns:
        :class:`Plan`.

    Raises:
        ValueError: lengths or targets is not a 1-D integer array of values in [1, 2**31), they differ in length, only
            one of targets and max_targets is given, max_tokens, max_targets or num_ranks is below 1, or a micro-batch
            would exceed int32 positions.
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
