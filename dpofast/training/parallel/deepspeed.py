"""DeepSpeed: ZeRO-3 from the constructor on, so that the reference pass needs a share of the model and one layer.

Trainer makes DeepSpeed's engine when training begins, and its own way to run before that (evaluate() with an engine for
inference) drops the optimizer from DeepSpeed's configuration, so that training afterwards would have another one. Here
the weights alone are partitioned when the trainer is built, by DeepSpeed's function for a model that is there already,
and gathered by hooks (model/parallel/zero.py) until the engine comes, which takes them as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dpofast.model.parallel.zero import gather_in_forwards, partition


def is_zero3(accelerator: Any) -> bool:
    """Whether accelerate trains with DeepSpeed's ZeRO-3, which partitions weights."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return plugin is not None and plugin.zero_stage == 3


def partition_early(accelerator: Any, model: nn.Module) -> None:
    """Partition a model's weights under ZeRO-3, unless that was done at load, and let its forwards gather them.

    Weights get the dtype that DeepSpeed trains in, so that the reference multiplies those that the policy does.
    """
    config = accelerator.state.deepspeed_plugin.hf_ds_config
    dtype = config.dtype()
    partition(model, config.config, dtype if dtype in (torch.float16, torch.bfloat16) else None)
    gather_in_forwards(model)
