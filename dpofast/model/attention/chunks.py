"""Chunked attention (Llama 4): a query sees only the keys of its own chunk of positions.

A run of rows (packing/segments.py) that crosses a border of chunks is cut there, and the keys of either part begin at
its chunk's first position. Every part is causal attention as before, aligned at the bottom right, so that each backend
runs it as a run of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from dpofast.packing.segments import Runs, Segments


def runs_of(segments: Segments, chunk: int | None) -> Runs:
    """The runs of attention in chunks of so many positions; None for one of all."""
    return segments.runs if chunk is None else _cut(segments.runs, chunk)


def _cut(runs: Runs, chunk: int) -> Runs:
    """The runs cut at every multiple of chunk positions, without the keys of other chunks.

    With chunk = 4, a run of 4 rows behind 3 others has positions 3 to 6: its first row sees the keys 0 to 3, and the
    others those from 4 on.
    """
    queries, keys = runs.cu_seqlens_q.diff().long(), runs.cu_seqlens_k.diff().long()
    first = (keys - queries) // chunk
    counts = (keys - 1) // chunk - first + 1
    run, number = _counted(counts)
    begin = (first[run] + number) * chunk
    end = (begin + chunk).minimum(keys[run])
    own = end - begin.maximum((keys - queries)[run])
    # Every range of a run's keys, at its positions, in each part of the run
    part, number = _counted(runs.range_counts[run])
    index = (runs.range_counts.cumsum(0) - runs.range_counts)[run][part] + number
    low, high = runs.ranges[index].unbind(1)
    sizes = runs.ranges.diff(dim=1).squeeze(1)
    position = (sizes.cumsum(0) - sizes - runs.cu_seqlens_k[:-1].long().repeat_interleave(runs.range_counts))[index]
    ranges = torch.stack((low + (begin[part] - position).clamp(min=0), high.minimum(low + end[part] - position)), dim=1)
    seen = ranges[:, 0] < ranges[:, 1]
    return Runs(
        pad(own.cumsum(0), (1, 0)).int(),
        pad((end - begin).cumsum(0), (1, 0)).int(),
        ranges[seen],
        part[seen].bincount(minlength=len(run)),
    )


def _counted(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For counts (2, 3): which of them, 0 0 1 1 1, and the number within, 0 1 0 1 2."""
    which = torch.arange(len(counts)).repeat_interleave(counts)
    return which, torch.arange(len(which)) - (counts.cumsum(0) - counts)[which]
