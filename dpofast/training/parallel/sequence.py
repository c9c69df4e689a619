"""Sequence parallelism of a run: the process group whose ranks compute the rows of a micro-batch together."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from dpofast.training.config import DPOConfig


def sequence_group(args: DPOConfig) -> Any:
    """Returns the process group of this rank and those that share its rows, or None without sequence parallelism.

    Its backend is that of the default group, so that rows are exchanged on the device. A collective of all processes:
    each makes the groups of all. Group g has the ranks [g·k, (g + 1)·k) of sequence_parallel_size = k.
    """
    size = args.sequence_parallel_size
    if size == 1:
        return None
    firsts = range(0, args.world_size, size)
    groups = [dist.new_group(list(range(first, first + size))) for first in firsts]
    return groups[args.process_index // size]
