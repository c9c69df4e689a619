"""This process among those that train together: plain numbers, exchanged on the CPU.

Counts, losses that were read back anyway and failures go over a gloo group of their own, so that no rank waits for its
device to learn them, and all ranks go on or stop together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


class Ranks:
    """One process, or the default process group; every method is a collective, and free where there is one process.

    Attributes:
        rank: this process's number.
        size: how many there are.
    """

    def __init__(self) -> None:
        """Join the default process group, where torch.distributed is initialized."""
        self.size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.rank = dist.get_rank() if self.size > 1 else 0
        self._group = dist.new_group(backend="gloo") if self.size > 1 else None

    @classmethod
    def alone(cls) -> Ranks:
        """One process by itself, whatever others there are."""
        ranks = cls.__new__(cls)
        ranks.size, ranks.rank, ranks._group = 1, 0, None
        return ranks

    def total(self, values: Sequence[float]) -> list[float]:
        """The sums over ranks, in float64."""
        return self._reduced(values, dist.ReduceOp.SUM) if self.size > 1 else list(values)

    def largest(self, value: float) -> float:
        """The largest of all ranks."""
        return self._reduced([value], dist.ReduceOp.MAX)[0] if self.size > 1 else value

    def gather(self, value: Any) -> list[Any]:
        """Everyone's value (anything that pickles; tensors on the CPU), in rank order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            dist.barrier(group=self._group)

    def _reduced(self, values: Sequence[float], operation: Any) -> list[float]:
        joined = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(joined, op=operation, group=self._group)
        return joined.tolist()
