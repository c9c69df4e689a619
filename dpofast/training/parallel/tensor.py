"""Tensor parallelism: transformers divides a model's layers by the tp_plan of its family, while it reads the weights.

Processes are groups of tensor_parallel_size that share each layer; between groups, FSDP2 shards what a process holds
of the layers. Each process reads its own shards from the files and no more. Adapters that are added afterwards are no
part of that: the gradients of those weights are averaged over the groups here.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule

from dpofast.model.parallel.tensor import tensor_parallel_size
from dpofast.model.parts import base_causal_lm
from dpofast.training.config import DPOConfig
from dpofast.training.layers.choose import will_shard

_SINCE = "5.23"  # of transformers


def check_tensor_parallel(args: DPOConfig) -> None:
    """Check the options beside tensor_parallel_size, and the version of transformers, before anything is loaded.

    Raises:
        ValueError: transformers trains no model that it has divided; FSDP or DeepSpeed of accelerate; options that need
            a whole model on each process.
    """
    from transformers import Trainer, __version__

    if not hasattr(Trainer, "_sync_replicated_trainable_parameters"):
        raise ValueError(
            f"tensor_parallel_size: expected transformers {_SINCE} or later, whose Trainer knows models that are "
            f"divided as they are loaded, got {__version__}: pip install 'transformers>={_SINCE}'"
        )
    size = args.tensor_parallel_size
    if args.distributed_state.distributed_type == DistributedType.MULTI_CPU:
        raise ValueError(
            f"tensor_parallel_size: expected GPUs, got {args.world_size} processes on {args.device}, where accelerate "
            "takes no model that is divided: leave it at 1; sequence_parallel_size runs on CPUs too"
        )
    refused = {
        "fsdp, deepspeed": (
            will_shard(args),
            f"the {args.world_size // size} groups of {size} processes shard the model between them by FSDP2 anyway: "
            "leave them out",
        ),
        "torch_compile": (bool(args.torch_compile), "layers exchange activations: leave it out"),
        "use_liger_kernel": (args.use_liger_kernel, "its layers know no plan: leave it out"),
        "sync_ref_model": (args.sync_ref_model, "the reference is divided, too: leave it out"),
        "max_tokens": (args.max_tokens == "auto", "'auto' probes one process alone: give a number"),
    }
    for name, (is_set, reason) in refused.items():
        if is_set:
            raise ValueError(f"{name}: not supported with tensor_parallel_size={size}: {reason}")


def loading_options(config: Any, args: DPOConfig, options: dict[str, Any]) -> dict[str, Any]:
    """from_pretrained's options for a model that is divided: options and distributed_config; else options alone.

    Args:
        config: the model's.
        args: the trainer's.
        options: what the model is loaded with beside.

    Raises:
        ValueError: its family has no plan, or options that exclude tensor parallelism.
    """
    size = args.tensor_parallel_size
    if size == 1:
        return options
    check_plan(config, args)
    for name in ("quantization_config", "device_map", "distributed_config", "tp_plan", "tp_size"):
        if options.get(name) is not None:
            raise ValueError(
                f"{name}: not supported with tensor_parallel_size={size}, which places and divides the weights: leave "
                f"{name} out"
            )
    from transformers.distributed import DistributedConfig

    groups = args.world_size // size
    return {**options, "distributed_config": DistributedConfig(tp_size=size, fsdp_size=groups)}


def check_plan(config: Any, args: DPOConfig) -> None:
    """Check that a model can be divided, by its config alone.

    Raises:
        ValueError: transformers has no plan for it, it has encoders, or tied embeddings where FSDP2 shards it between
            several groups, too.
    """
    text, size = config.get_text_config(), args.tensor_parallel_size
    if text is not config:
        raise ValueError(
            f"tensor_parallel_size: expected a language model alone, got {config.model_type}, whose encoders have no "
            f"plan that has been tried, and size {size}: leave it at 1; fsdp shards such a model"
        )
    if not getattr(text, "base_model_tp_plan", None):
        raise ValueError(
            f"tensor_parallel_size: transformers has no plan by which to divide {text.model_type} (base_model_tp_plan "
            f"of its config), got {size}: leave it at 1; fsdp shards any model"
        )
    if getattr(text, "tie_word_embeddings", False) and size < args.world_size:
        raise ValueError(
            f"tensor_parallel_size: expected {args.world_size}, the number of processes, for {text.model_type} with "
            f"tied embeddings, got {size}: FSDP2, which shards it between groups of {size}, frees the embedding before "
            f"the head reads it: start {size} processes, or leave it at 1 and set fsdp"
        )


def adopt_size(model: Any, args: DPOConfig, name: str) -> None:
    """Let a model that was given loaded decide about tensor_parallel_size, where the arguments leave it at 1.

    Args:
        model: whole, or divided by transformers.
        args: the trainer's own, changed in place.
        name: of the model, in messages.

    Raises:
        ValueError: the arguments name another size than the model has; it is divided in another way than by tensor
            parallelism and FSDP2, or has an adapter already.
    """
    size, wanted = tensor_parallel_size(model), args.tensor_parallel_size
    if size > 1 and hasattr(model, "peft_config"):
        raise ValueError(
            f"{name}: expected a divided model without an adapter, got one that PEFT has put on its shards: give its "
            "base model, and peft_config, whose adapter equals that of a whole model"
        )
    if size == wanted:
        return
    if wanted > 1:
        raise ValueError(
            f"{name}: expected a model divided over tensor_parallel_size={wanted} processes, got "
            f"{'a whole one' if size == 1 else f'one over {size}'}: give its name or folder, or load it with "
            f"distributed_config=DistributedConfig(tp_size={wanted}, fsdp_size={args.world_size // wanted})"
        )
    config = model.config.distributed_config
    for option in ("pp_size", "ep_size", "dp_replicate_size"):
        if getattr(config, option, 1) > 1:
            raise ValueError(f"{name}: expected a model divided by tp_size and fsdp_size alone, got {option} > 1")
    args.tensor_parallel_size = size
    check_tensor_parallel(args)


def second_reference(model: str, args: DPOConfig) -> str | None:
    """The policy's name, where the reference in the step is to be loaded by it once more: FSDP2's shards have no copy.

    Of a policy without an adapter; None where a copy, or log-probs before training, are the reference.
    """
    live = args.preference_loss().needs_reference and not args.precompute_ref_log_probs
    return model if live and 1 < args.tensor_parallel_size < args.world_size else None


def reshard_always(model: nn.Module) -> None:
    """Let FSDP2 free the gathered weights of every layer after its forward, as transformers leaves those of the head.

    Passes without gradients would end with whole weights in place of shards, for whatever reads them next.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(True, recurse=False)


def synchronize_replicas(model: nn.Module, accelerator: Any) -> None:
    """Keep trainable weights that FSDP2 does not manage, those of adapters, equal in all groups. A collective.

    They get the values of the first group here, and the mean of its gradients in each backward that synchronizes.
    """
    base: Any = base_causal_lm(model)
    _follow_frozen(model)
    mesh = base._mesh_manager.get_mesh("fsdp")
    if mesh.size() == 1:
        return
    group, first = mesh.get_group(), int(mesh.mesh.flatten()[0])

    def average(weight: Any) -> None:
        if accelerator.sync_gradients:
            own = _local(weight.grad)
            dist.all_reduce(own, group=group)
            own.div_(mesh.size())

    for weight in model.parameters():
        if weight.requires_grad and "fsdp" not in _mesh_names(weight):
            dist.broadcast(_local(weight.data), src=first, group=group)
            if not getattr(weight, "_dpofast_averaged", False):  # train() may run again
                weight.register_post_accumulate_grad_hook(average)
                weight._dpofast_averaged = True  # type: ignore[attr-defined]


def _follow_frozen(model: nn.Module) -> None:
    """Let FSDP2's gathered weights require gradients only where their shards do: an adapter froze them since."""
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        group = module._get_fsdp_state()._fsdp_param_group
        for each in group.fsdp_params if group is not None else ():
            if hasattr(each, "_unsharded_param"):
                each._unsharded_param.requires_grad_(each.sharded_param.requires_grad)


def _local(tensor: Any) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _mesh_names(weight: Any) -> tuple[str, ...]:
    mesh = getattr(weight, "device_mesh", None)
    return () if mesh is None else mesh.mesh_dim_names or ()
