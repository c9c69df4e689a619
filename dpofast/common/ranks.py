"""Ranks: collectives on plain numbers and pickled objects, on the CPU.

They use a gloo group of their own, so that exchanging counts, failures and losses that are on the CPU already needs no
device sync.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


class Ranks:
    """Collectives over the default process group; trivial with one process.

    Every method must be called by all ranks.

    Attributes:
        rank: the rank of this process, 0 with one process.
        size: the world size, 1 with one process.
    """

    def __init__(self) -> None:
        """Create a gloo group over the default process group, where torch.distributed is initialized."""
        self.size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.rank = dist.get_rank() if self.size > 1 else 0
        self._group = dist.new_group(backend="gloo") if self.size > 1 else None

    @classmethod
    def alone(cls) -> Ranks:
        """Ranks of this process alone, also where a process group is initialized: nothing is exchanged."""
        ranks = cls.__new__(cls)
        ranks.size, ranks.rank, ranks._group = 1, 0, None
        return ranks

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """The sums of each value over ranks, in float64."""
        return self._reduced(values, dist.ReduceOp.SUM) if self.size > 1 else list(values)

    def all_reduce_max(self, value: float) -> float:
        """The largest value over ranks."""
        return self._reduced([value], dist.ReduceOp.MAX)[0] if self.size > 1 else value

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all ranks (anything that pickles; tensors on the CPU), in rank order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def barrier(self) -> None:
        """Wait until all ranks have called it."""
        if self.size > 1:
            dist.barrier(group=self._group)

    def _reduced(self, values: Sequence[float], operation: Any) -> list[float]:
        reduced = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(reduced, op=operation, group=self._group)
        return reduced.tolist()
