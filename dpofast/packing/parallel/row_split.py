"""RowSplit: which rows and targets of a packed batch each rank of a group computes.

Ranks take rows in turn: with 3 ranks, rank 0 has rows 0, 3, 6 …, so that each has as many rows and about as many of the
targets, which lie close together (a long prompt has none). Attention needs no more than that: it puts the rows of all
ranks together, each rank for its own heads (model/parallel).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, eq=False)
class RowSplit:
    """This rank's part of T rows and N targets, of k ranks; R = ⌈T / k⌉ rows on every rank.

    Attributes:
        group: the process group of the k ranks.
        rows: (R,) int64, this rank's rows; a place beyond the last row holds row 0, whose result nobody reads.
        targets: (N_r,) int64, the targets that this rank's rows predict.
        logit_rows: (N_r,) int64, the places of the rows that predict them among `rows`.
        gathered: (N,) int64, where each target's value lies in the values of all ranks, each padded to `most`, one
            after the other.
        most: the most targets of a rank.
        num_rows: T.
    """

    group: Any
    rows: Tensor
    targets: Tensor
    logit_rows: Tensor
    gathered: Tensor
    most: int
    num_rows: int

    @classmethod
    def of(cls, num_rows: int, logit_rows: Tensor, group: Any) -> RowSplit:
        """The part of the rank that calls it.

        Args:
            num_rows: T.
            logit_rows: (N,) int64 on the CPU, the row that predicts each target.
            group: the process group that shares the rows.
        """
        size, rank = group.size(), group.rank()
        per_rank = -(-num_rows // size)
        rows = torch.arange(rank, size * per_rank, size)
        owner = logit_rows % size
        counts = owner.bincount(minlength=size)
        order = owner.argsort(stable=True)
        places = torch.arange(len(order)) - (counts.cumsum(0) - counts)[owner[order]]
        most = int(counts.max())
        gathered = torch.empty_like(order)
        gathered[order] = owner[order] * most + places
        targets = (owner == rank).nonzero().squeeze(1)
        return cls(
            group=group,
            rows=torch.where(rows < num_rows, rows, 0),
            targets=targets,
            logit_rows=logit_rows[targets] // size,
            gathered=gathered,
            most=most,
            num_rows=num_rows,
        )

    def moved(self, move: Callable[[Tensor], Tensor]) -> RowSplit:
        """A copy with move() applied to every tensor."""
        tensors: dict[str, Any] = {
            name: move(getattr(self, name)) for name in ("rows", "targets", "logit_rows", "gathered")
        }
        return replace(self, **tensors)

    def padded(self, values: Tensor) -> Tensor:
        """Values of this rank's targets (N_r,), with zeros up to `most`."""
        return pad(values, (0, self.most - len(values)))
