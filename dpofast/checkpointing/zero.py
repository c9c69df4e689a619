"""Weights that DeepSpeed's ZeRO-3 has partitioned, read whole: in place of each it leaves an empty tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 has partitioned some of a model's weights."""
    return any(hasattr(weight, "ds_id") for weight in model.parameters())


def whole_shape(weight: Tensor) -> torch.Size:
    """The shape of a weight, partitioned or not."""
    shape: torch.Size = getattr(weight, "ds_shape", weight.shape)
    return shape


@contextlib.contextmanager
def whole(*weights: Any) -> Iterator[None]:
    """Inside, these weights are whole in every process; they must not be changed. A collective where partitioned."""
    absent = [weight for weight in weights if _is_absent(weight)]
    if not absent:
        yield
        return
    from deepspeed import zero

    with contextlib.ExitStack() as gathered:
        with torch._C.DisableTorchFunction():  # the parity check widens what torch's functions get
            gathered.enter_context(zero.GatheredParameters(absent))
        try:
            yield
        finally:
            with torch._C.DisableTorchFunction():
                gathered.close()


def _is_absent(weight: Any) -> bool:
    return hasattr(weight, "ds_id") and bool(weight.ds_status.name == "NOT_AVAILABLE")
