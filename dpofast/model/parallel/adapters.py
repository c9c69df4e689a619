"""PEFT's adapters on layers that transformers has split over ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from dpofast.model.parallel.tensor import tensor_parallel_size


@contextlib.contextmanager
def whole_layers(model: Any) -> Iterator[None]:
    """Inside, PEFT makes LoRA matrices of the size of whole layers, which it then splits as the layers are.

    It would make them of the size of this rank's shard (peft 0.21), whose initial values differ from those on one
    process, and which is also a shard among FSDP2's where there are several groups.
    """
    if tensor_parallel_size(model) == 1:
        yield
        return
    from peft.tuners.lora import layer

    own = layer._get_in_out_features

    def of_whole(module: nn.Module) -> Any:
        if isinstance(module, nn.Linear) and hasattr(module.weight, "device_mesh"):
            return module.in_features, module.out_features
        return own(module)

    layer._get_in_out_features = of_whole
    try:
        yield
    finally:
        layer._get_in_out_features = own
