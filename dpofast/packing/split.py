"""split_by_kind: the same batch with fewer shared rows, for models in which a row depends on what follows it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dpofast.packing.batch import PackedBatch
from dpofast.packing.segments import Segments


def split_by_kind(batch: PackedBatch, kinds: Tensor) -> PackedBatch:
    """A batch of the same sequences, targets and pairs, in which only sequences of one kind share rows.

    Args:
        batch: on any device; its indices are read back from there.
        kinds: (S,) integers on the CPU.
    """
    segments, logit_rows, counts = batch.segments, batch.logit_rows.cpu(), batch.cu_targets.diff().long()
    last_rows = logit_rows[batch.cu_targets[1:].long() - 1]
    ends, segment_of = segments.by_row(segments.ends), segments.by_row(torch.arange(segments.num_segments))
    source, sizes, parents = [], [], []
    moved, rows, offset = torch.empty_like(logit_rows), 0, 0
    for kind in kinds.unique():
        ending = torch.zeros(batch.num_tokens + 1, dtype=torch.int64).index_add_(
            0, last_rows[kinds == kind] + 1, torch.ones(int((kinds == kind).sum()), dtype=torch.int64)
        )
        before = ending.cumsum(0)
        used = before[ends] > before[:-1]  # a sequence of this kind ends at the row or behind it, on its path
        of_kind = (kinds == kind).repeat_interleave(counts)
        moved[of_kind] = rows + used.cumsum(0)[logit_rows[of_kind]] - 1
        source.append(used.nonzero().squeeze(1))
        rows += len(source[-1])
        size = torch.zeros(segments.num_segments, dtype=torch.int64).index_add_(0, segment_of, used.long())
        kept = size > 0
        index = torch.cat((kept.cumsum(0) - 1 + offset, torch.tensor([-1])))  # of a kept segment; -1 stays -1
        sizes.append(size[kept])
        parents.append(index[segments.parents[kept].long()])
        offset += len(sizes[-1])
    if rows == batch.num_tokens:
        return batch
    kept_rows = torch.cat(source).to(batch.input_ids.device)
    cu_seqlens = torch.nn.functional.pad(torch.cat(sizes).cumsum(0), (1, 0)).int()
    return replace(
        batch,
        input_ids=batch.input_ids[kept_rows],
        position_ids=batch.position_ids[kept_rows],
        logit_rows=moved.to(batch.logit_rows.device),
        segments=Segments(cu_seqlens, torch.cat(parents).int()),
        media=None if batch.media is None else batch.media.at_rows(kept_rows),
    )


def following_value(values: Tensor) -> Tensor:
    """Values (T,) of rows that predict a target, 0 elsewhere: every other row takes that of the next one on its path.

    Rows lie depth first, so the next row that predicts a target is on the path.
    """
    rows = torch.arange(len(values), device=values.device)
    following = torch.where(values > 0, rows, len(values)).flip(0).cummin(0).values.flip(0)
    return values[following]
