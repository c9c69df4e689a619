"""Sharded training (FSDP2, DeepSpeed): what is refused, when gradients are synchronized, and FSDP2's precision.

accelerate's defaults for mixed precision round what enters and leaves every sharded module to 16 bits, log-probs and
the reference's among them; forward_dtype() turns that off. early.py shards.
dpofast.checkpointing.fsdp writes and reads checkpoints of such a model.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import DistributedType, str_to_bool
from torch import nn

from dpofast.checkpointing.fsdp import first_shard
from dpofast.model.parallel.tensor import tensor_parallel_size
from dpofast.model.parts import named_layers

_NOT_SHARDED = {
    "save_only_model": "a checkpoint without an optimizer is a model's folder, and shards are none",
    "save_on_each_node": "the shards of all ranks belong into one folder",
}


def is_sharded(accelerator: Any) -> bool:
    """Whether every forward of the model is a collective: under FSDP, DeepSpeed and tensor parallelism."""
    if (getattr(getattr(accelerator, "parallelism_config", None), "tp_size", None) or 1) > 1:
        return True
    plugins = ("fsdp_plugin", "deepspeed_plugin")
    return any(getattr(accelerator.state, name, None) is not None for name in plugins)


@contextlib.contextmanager
def without_sync(accelerator: Any, model: nn.Module) -> Iterator[None]:
    """Inside, backward() accumulates gradients on this rank alone, and does not step DeepSpeed's engine.

    FSDP2 keeps unsharded gradients meanwhile. With accelerate's option sync_each_batch it keeps a shard and exchanges
    gradients in every backward instead.
    """
    state = accelerator.gradient_state
    state._set_sync_gradients(False)
    each = is_sharded(accelerator) and state.plugin_kwargs.get("sync_each_batch", False)
    try:
        with contextlib.nullcontext() if each else accelerator.no_sync(model):
            yield
    finally:
        state._set_sync_gradients(True)


def asks_for(args: Any, way: str) -> bool:
    """Whether accelerate is told to train with "fsdp" or "deepspeed", by arguments or by its launcher."""
    return bool(getattr(args, way)) or os.environ.get(f"ACCELERATE_USE_{way.upper()}", "false").lower() == "true"


def check_sharding(args: Any) -> None:
    """Check the FSDP options of a TrainingArguments and the device.

    Raises:
        ValueError: FSDP on the CPU, where accelerate would train with DDP and not say so; FSDP1; loading on the first
            process alone; another kind of checkpoint than whole or sharded; an option that sharded ones do not allow.
    """
    if not asks_for(args, "fsdp"):
        return
    if args.distributed_state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise ValueError(
            f"fsdp: expected several GPUs under a launcher (torchrun), got {args.device}, {args.world_size} processes: "
            "accelerate does not shard there and would train whole copies without a word; leave fsdp out for DDP"
        )
    config = args.fsdp_config or {}
    version = int(config.get("version", 2) if args.fsdp else os.environ.get("FSDP_VERSION", 1))
    if version != 2:
        raise ValueError(f'fsdp_config: expected version 2 (FSDP2), got {version}: set {{"version": 2}}')
    if args.fsdp and str_to_bool(str(config.get("cpu_ram_efficient_loading") or False).lower()):
        raise ValueError(
            "fsdp_config: cpu_ram_efficient_loading: expected false or nothing, got true: processes share "
            "the memory of the files that they read a model from by its name, and convert shards; leave it out"
        )
    default = "FULL_STATE_DICT" if args.fsdp else os.environ.get("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
    kind = config.get("state_dict_type", default) if args.fsdp else default
    if kind not in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        raise ValueError(f"fsdp_config: state_dict_type: expected FULL_STATE_DICT or SHARDED_STATE_DICT, got {kind}")
    if kind == "FULL_STATE_DICT":
        return
    for name, reason in _NOT_SHARDED.items():
        if getattr(args, name, False):
            raise ValueError(
                f"{name}: expected no SHARDED_STATE_DICT beside it: {reason}; leave {name} out, or set "
                '{"state_dict_type": "FULL_STATE_DICT"} in fsdp_config (FSDP_STATE_DICT_TYPE of accelerate launch)'
            )


def check_whole(model: nn.Module, name: str) -> None:
    """Check that every rank holds the whole model, or transformers has divided it.

    Raises:
        ValueError: a weight is sharded already: the trainer would give the ranks that share it different pairs.
    """
    if tensor_parallel_size(model) == 1 and (shard := first_shard(model)) is not None:
        key, weight = shard
        raise ValueError(
            f"{name}: expected whole weights, got {key} sharded over {weight.device_mesh.size()} devices: FSDP2 "
            "shards it here, by the option fsdp, and transformers divides layers as it loads a model: "
            "tensor_parallel_size, or from_pretrained(..., distributed_config=DistributedConfig(tp_size=...))"
        )


def forward_dtype(accelerator: Any) -> torch.dtype | None:
    """Returns the dtype in which FSDP2 gathers the policy's weights under mixed precision, else None.

    Also sets accelerate's FSDP policy so that weights are gathered and multiplied in this dtype, master weights,
    gradients and their sums over ranks stay in float32, and inputs and outputs of a module are not rounded: log-probs
    are float32.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    policy = getattr(plugin, "mixed_precision_policy", None)
    if plugin is None or policy is None or policy.param_dtype is None:
        return None
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=policy.param_dtype, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
    )
    return policy.param_dtype


def shard_layers_that_are_there(accelerator: Any, model: Any) -> None:
    """Let FSDP2 shard those classes of layers that transformers names for this model and that it has, unless told.

    Those of CLIP and SigLIP towers name layers of their text encoders too, which accelerate then looks for in vain.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.transformer_cls_names_to_wrap is None:
        found = {type(module).__name__ for module in model.modules()} & named_layers(model)
        plugin.transformer_cls_names_to_wrap = sorted(found) or None


def cast_parameters(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Convert a model's floating-point parameters, in place, to the dtype of forward_dtype(); buffers stay.

    None does nothing. A reference model is converted so that it multiplies the same rounded weights as the policy.
    4-bit weights stay, whose packed bits are no numbers.
    """
    for parameter in model.parameters() if dtype is not None else ():
        if parameter.is_floating_point() and type(parameter).__name__ != "Params4bit":
            parameter.data = parameter.data.to(dtype)
