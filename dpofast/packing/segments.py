"""Segments of a packed row: a trie of token sequences laid out depth first, and the keys that attention reads for it.

Sequences that begin alike share the rows of their common beginning. A segment is a run of rows without a fork; its
parent is the segment whose last row its first row follows. A row's history is its path: the rows of the segment's
ancestors, and the earlier rows of its own.

    tokens of three sequences     row  0  1  2  3  4  5  6  7  8
    a b c d e                          a  b  c  d  e | f  g | h  i       segments [0,3) [3,5) [5,7) [7,9)
    a b c f g                          └──────┘ └──┘   └──┘   └──┘       parents   -1    0     0    -1
    h i
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Runs(NamedTuple):
    """Queries and keys of variable-length causal attention (bottom-right aligned), in R runs.

    A run is a segment with its first child, that one's first child, and so on: consecutive rows of one path, which
    attend in one piece. Run r's queries are rows [cu_seqlens_q[r], cu_seqlens_q[r + 1]). Its keys are the rows of its
    whole path in order of position, the last of them its own.

    Attributes:
        cu_seqlens_q: (R + 1,) int32 on the CPU.
        cu_seqlens_k: (R + 1,) int32 on the CPU, cumulative key counts.
        ranges: (M, 2) int64 on the CPU: the keys of every run as ranges [start, stop) of rows, run after run.
        range_counts: (R,) int64 on the CPU, how many of them each run has.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    ranges: Tensor
    range_counts: Tensor

    def key_rows(self) -> Tensor:
        """Packed row of every key, ordered by run and position: (K,) int64 on the CPU, K = cu_seqlens_k[-1]."""
        starts, stops = self.ranges.unbind(1)
        counts = stops - starts
        shift = starts - (counts.cumsum(0) - counts)
        return shift.repeat_interleave(counts) + torch.arange(int(counts.sum()))

    def of_rows(self, rows: Tensor) -> Tensor:
        """The run of each of these rows, int64 on their device."""
        return torch.searchsorted(self.cu_seqlens_q[1:].to(rows.device), rows, right=True)


@dataclass(frozen=True, eq=False)
class Segments:
    """A packed row of T positions in G segments.

    Attributes:
        cu_seqlens_q: (G + 1,) int32 on the CPU; segment g is rows [cu_seqlens_q[g], cu_seqlens_q[g + 1]).
        parents: (G,) int32 on the CPU; the segment that g follows, which stands before it, or −1 where g begins a
            sequence. Segments stand in depth-first order.
    """

    cu_seqlens_q: Tensor
    parents: Tensor

    @property
    def num_segments(self) -> int:
        """The number of segments, G."""
        return len(self.parents)

    @property
    def num_rows(self) -> int:
        """Packed positions, T."""
        return int(self.cu_seqlens_q[-1])

    @cached_property
    def depths(self) -> Tensor:
        """Position of each segment's first row, the number of rows of its ancestors: (G,) int64 on the CPU."""
        bounds: list[int] = self.cu_seqlens_q.tolist()
        depths: list[int] = []
        for parent in self.parents.tolist():
            depths.append(0 if parent < 0 else depths[parent] + bounds[parent + 1] - bounds[parent])
        return torch.tensor(depths, dtype=torch.int64)

    @cached_property
    def ends(self) -> Tensor:
        """The row after each segment and all its descendants: (G,) int64 on the CPU.

        Row k, in segment g, is in the history of row q if and only if k ≤ q < ends[g].
        """
        ends, parents = self.cu_seqlens_q.tolist()[1:], self.parents.tolist()
        for segment in range(len(ends) - 1, -1, -1):
            parent = parents[segment]
            if parent >= 0:
                ends[parent] = max(ends[parent], ends[segment])
        return torch.tensor(ends, dtype=torch.int64)

    def by_row(self, values: Tensor) -> Tensor:
        """(T,): the value (G,) of each row's segment, on the CPU."""
        return values.repeat_interleave(self.cu_seqlens_q.diff().long())

    def positions(self) -> Tensor:
        """Position of every row in its sequences: (T,) int64 on the CPU."""
        return self.by_row(self.depths - self.cu_seqlens_q[:-1]) + torch.arange(self.num_rows)

    def longest_path(self) -> int:
        """Rows of the longest path; 0 without rows."""
        return int((self.depths + self.cu_seqlens_q.diff()).max()) if self.num_segments else 0

    @cached_property
    def runs(self) -> Runs:
        """The queries and keys of attention.

        Raises:
            ValueError: the total number of keys exceeds int32.
        """
        bounds, parents = self.cu_seqlens_q.tolist(), self.parents.tolist()
        starts = [g for g, parent in enumerate(parents) if parent != g - 1 or parent < 0]
        run_of: list[int] = []
        paths: list[list[int]] = []  # start and stop of each range before a run's own
        depths: list[int] = []  # rows in them
        ranges, counts, key_counts = [], [], []
        for run, (first, stop) in enumerate(pairwise([*starts, len(parents)])):
            run_of += [run] * (stop - first)
            path, depth, parent = [], 0, parents[first]
            if parent >= 0:
                # up to the fork, which is in the parent's run, and all before it
                above = run_of[parent]
                low, high = bounds[starts[above]], bounds[parent + 1]
                path, depth = [*paths[above], low, high], depths[above] + high - low
            paths.append(path)
            depths.append(depth)
            ranges += [*path, bounds[first], bounds[stop]]
            counts.append(len(path) // 2 + 1)
            key_counts.append(depth + bounds[stop] - bounds[first])
        cu_seqlens_k = [0, *accumulate(key_counts)]
        if cu_seqlens_k[-1] > torch.iinfo(torch.int32).max:
            raise ValueError(
                f"the segments see {cu_seqlens_k[-1]} keys; int32 allows 2**31 - 1: pack with a smaller max_tokens"
            )
        return Runs(
            torch.tensor([*(bounds[start] for start in starts), bounds[-1]], dtype=torch.int32),
            torch.tensor(cu_seqlens_k, dtype=torch.int32),
            torch.tensor(ranges, dtype=torch.int64).view(-1, 2),
            torch.tensor(counts, dtype=torch.int64),
        )
