"""FSDP2 under the trainer: what is refused, the precision of a forward on gathered weights, and checkpoints.

accelerate shards the model as training begins. Its defaults for mixed precision round what enters and leaves every
sharded module to 16 bits, log-probs and the reference's among them; and it keeps weights in a pickle. Here they are
neither rounded nor pickled.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import Tensor, nn


def check_sharding(args: Any) -> None:
    """Look at the FSDP options of a TrainingArguments, and at the device.

    Raises:
        ValueError: FSDP on the CPU, where accelerate would train with DDP and not say so; FSDP1; sharded checkpoints.
    """
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"  # accelerate launch --use_fsdp
    if not (args.fsdp or launched):
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
    kind = config.get("state_dict_type") if args.fsdp else os.environ.get("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
    if kind not in (None, "FULL_STATE_DICT"):
        raise ValueError(
            f"fsdp_config: state_dict_type: expected FULL_STATE_DICT, got {kind}, which leaves pickled shards and no "
            "model: weights are written whole, as safetensors"
        )


def first_shard(model: nn.Module) -> tuple[str, Any] | None:
    """Name and weight of the first DTensor, None where all weights are whole."""
    return next(((name, w) for name, w in model.named_parameters() if hasattr(w, "device_mesh")), None)


def check_whole(model: nn.Module, name: str) -> None:
    """Look for weights of which each rank has a part.

    Raises:
        ValueError: one such: the trainer would give the ranks that share it different pairs.
    """
    if (shard := first_shard(model)) is not None:
        key, weight = shard
        raise ValueError(
            f"{name}: expected whole weights, got {key} sharded over {weight.device_mesh.size()} devices: FSDP2 "
            "shards in train(), by the option fsdp; tensor parallelism needs a loop of your own, in which "
            "linear_logprobs takes a head that is split by its vocabulary"
        )


def forward_dtype(accelerator: Any) -> torch.dtype | None:
    """The dtype of the policy's gathered weights where FSDP2 mixes precisions, else None.

    Weights are gathered and multiplied in it; masters, gradients and their sums over ranks stay in float32, and nothing
    that goes in or comes out is rounded: log-probs are float32.
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


def cast_parameters(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Give a whole model the parameters that a sharded policy's forward has; None leaves them. Buffers stay."""
    for parameter in model.parameters() if dtype is not None else ():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


@contextlib.contextmanager
def parameters_in(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """cast_parameters, undone at the end: costs the copies' memory.

    The reference must take the policy's path, so that at step 0 the margin is 0.
    """
    masters = [(parameter, parameter.data) for parameter in model.parameters()]
    try:
        cast_parameters(model, dtype)
        yield
    finally:
        for parameter, data in masters:
            parameter.data = data


def save_optimizer(trainer: Any, folder: str) -> None:
    """Gather the optimizer's state and write it, and the scheduler's, on the first rank; every rank calls this."""
    from accelerate.utils import save_fsdp_optimizer

    plugin = trainer.accelerator.state.fsdp_plugin
    save_fsdp_optimizer(plugin, trainer.accelerator, trainer.optimizer, trainer.model, folder)
    if trainer.args.should_save:
        torch.save(trainer.lr_scheduler.state_dict(), os.path.join(folder, "scheduler.pt"))


def saved_once(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A gathered state dict without second names of tied weights, which are tensors of their own in it."""
    tied = getattr(model, "all_tied_weights_keys", None) or ()
    return {name: tensor for name, tensor in state.items() if name not in tied}


def load_weights(model: Any, folder: str) -> None:
    """Each rank's shard of what a checkpoint's safetensors hold: all weights, or an adapter's.

    Raises:
        ValueError: files that do not have every weight, or others than the model's.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    names: dict[str, Any] = {name: name for name in saved_once(model, model.state_dict())}
    if hasattr(model, "peft_config"):  # PEFT's own rule, applied to names: those in the file, and the model's
        from peft import get_peft_model_state_dict

        adapter = model.active_adapter
        names = get_peft_model_state_dict(model, names, adapter_name=adapter, save_embedding_layers=False)
    found: dict[str, Tensor] = {}
    for path in [*Path(folder).glob("model*.safetensors"), *Path(folder).glob("adapter_model.safetensors")]:
        found.update(load_file(path))
    missing, unknown = sorted(names.keys() - found.keys()), sorted(found.keys() - names.keys())
    if missing or unknown:
        raise ValueError(
            f"{folder}: expected the weights of {type(model).__name__} in its safetensors, "
            f"{len(missing)} are missing {missing[:3]} and {len(unknown)} unknown {unknown[:3]}"
        )
    state: dict[str, Any] = {names[name]: tensor for name, tensor in found.items()}
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, strict=False))
