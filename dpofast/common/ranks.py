"""Ranks: collectives on plain numbers and pickled objects, on the CPU.

They use gloo groups of their own, so that exchanging counts, failures and losses that are on the CPU already needs no
device sync.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

# Of each default group: threads of a gloo group wake up as long as it lives, so that one for each trainer would add up.
_made: WeakKeyDictionary[Any, dict[Any, list[Any]]] = WeakKeyDictionary()


def process_groups(members: Sequence[Sequence[int]], backend: str | None = None) -> list[Any]:
    """Returns a process group of each of these ranks, made at the first call. A collective of all processes.

    Args:
        members: the ranks of each group.
        backend: None for that of the default group.
    """
    known = _made.setdefault(dist.group.WORLD, {})
    key = (backend, *map(tuple, members))
    if key not in known:
        known[key] = [dist.new_group(list(ranks), backend=backend) for ranks in members]
    return known[key]


class Ranks:
    """Collectives over the default process group; trivial with one process.

    Where `sharing` consecutive processes work on the same data (tensor or sequence parallelism), they are one rank:
    sums and gathered values count their data once, and all of them get the same result. Every method must be called by
    all processes.

    Args:
        sharing: how many consecutive processes share their data; it divides the number of processes.

    Attributes:
        rank: which share of the data this process has, 0 with one process.
        size: the number of shares, 1 with one process.
        processes: the world size, size · sharing.
        process: the number of this process among them.
    """

    def __init__(self, sharing: int = 1) -> None:
        """Create gloo groups over the default process group, where torch.distributed is initialized."""
        self.processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.size = self.processes // sharing
        self.process = dist.get_rank() if self.processes > 1 else 0
        self.rank, place = divmod(self.process, sharing)
        self._everyone = process_groups([range(self.processes)], "gloo")[0] if self.processes > 1 else None
        self._group = self._everyone
        if sharing > 1:
            shares = [range(first, self.processes, sharing) for first in range(sharing)]
            self._group = process_groups(shares, "gloo")[place]

    @property
    def everyone(self) -> Ranks:
        """All processes, also those that share their data: each of them is a rank of its own here."""
        ranks = Ranks.alone()
        ranks.size = ranks.processes = self.processes
        ranks.rank = ranks.process = self.process
        ranks._group = ranks._everyone = self._everyone
        return ranks

    @property
    def is_first_of_group(self) -> bool:
        """Whether this process is the first of those that share its data: the one that writes."""
        return self.process == self.rank * (self.processes // self.size)

    @classmethod
    def alone(cls) -> Ranks:
        """Ranks of this process alone, also where a process group is initialized: nothing is exchanged."""
        ranks = cls.__new__(cls)
        ranks.size, ranks.processes, ranks.rank, ranks.process = 1, 1, 0, 0
        ranks._group = ranks._everyone = None
        return ranks

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """The sums of each value over shares of the data, in float64."""
        return self._reduced(values, dist.ReduceOp.SUM, self._group) if self.size > 1 else list(values)

    def all_reduce_max(self, value: float) -> float:
        """The largest value over all processes."""
        return self._reduced([value], dist.ReduceOp.MAX, self._everyone)[0] if self.processes > 1 else value

    def all_gather(self, value: Any) -> list[Any]:
        """The values of each share of the data (anything that pickles; tensors on the CPU), in rank order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def barrier(self) -> None:
        """Wait until all processes have called it."""
        if self.processes > 1:
            dist.barrier(group=self._everyone)

    @staticmethod
    def _reduced(values: Sequence[float], operation: Any, group: Any) -> list[float]:
        reduced = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(reduced, op=operation, group=group)
        return reduced.tolist()
