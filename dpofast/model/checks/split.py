"""Compares a model's log-probs with its rows split over processes and without, on a few random ids.

Every rank of a group computes each k-th row, which is right where layers but attention compute rows one by one. A layer
that mixes rows, such as a convolution, would read those k positions away, without an exception.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from dpofast.common.eval_mode import eval_mode
from dpofast.model.checks.parity import PARITY_TOLERANCE, computed_in, random_batch
from dpofast.model.parts import base_causal_lm
from dpofast.model.wrappers import input_device

_PAIRS = 3  # of 13 rows each: no group of 2, 4, 8 … processes divides them


@torch.no_grad()
def check_split(model: Any, group: Any, dtype: torch.dtype | None = None) -> None:
    """Check that a model computes a batch that is split over a group as it does on one process. A collective.

    Args:
        model: attached, where it will run; every rank of the group, and of a sharded model every rank, calls it.
        group: the process group that shares rows.
        dtype: in which a sharded model's weights are gathered, None for that of its weights.

    Raises:
        ValueError: on every rank of the group, where log-probs differ by more than PARITY_TOLERANCE on one.
    """
    batch, device = random_batch(model, _PAIRS), input_device(model)
    with eval_mode(model):
        alone = model(packed=batch.to(device)).logps
        split = model(packed=batch.split_over(group).to(device)).logps
    difference = (split - alone).abs().max()
    dist.all_reduce(difference, dist.ReduceOp.MAX, group=group)
    tolerance, apart = PARITY_TOLERANCE[dtype or computed_in(model)], float(difference)
    if not apart <= tolerance:
        raise ValueError(
            f"{type(base_causal_lm(model)).__name__}: its log-probs differ by {apart:.2g} nats, more than {tolerance}, "
            f"where its rows are split over {group.size()} processes: some layer of it reads other rows than through "
            "attention, as a convolution does: train it without sequence parallelism"
        )
