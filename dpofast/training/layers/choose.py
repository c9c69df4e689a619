"""Chooses what the decoder layers of a run run as.

On a GPU the elementwise work of eager layers (norms, rotary embeddings, SwiGLU, residuals) takes a third of a step, so
there they are compiled unless the arguments say otherwise; use_liger_kernel is the other way to fused layers.
"""

from __future__ import annotations

from typing import Any

from dpofast.model.wrappers import is_dispatched
from dpofast.training.config import DPOConfig
from dpofast.training.layers.compiled import compile_layers, layers_to_compile, uncompile_layers
from dpofast.training.layers.liger import use_liger_layers
from dpofast.training.parallel.fsdp import asks_for


def fuse_layers(model: Any, args: DPOConfig) -> None:
    """Give a model Liger's layers where args ask for them; before its log-prob head is attached."""
    if args.use_liger_kernel:
        use_liger_layers(model, args)


def compile_chosen(models: list[Any], args: DPOConfig) -> str | None:
    """Compile the layers of policy and reference where args say so, or by default where that is known to work.

    Args:
        models: with attached heads; the policy first.
        args: the trainer's.

    Returns:
        What was chosen by default, to be said once; None where args have chosen, and on a CPU.

    Raises:
        ValueError: torch_compile for a model without layers to compile, or one that is sharded.
    """
    for model in models:
        uncompile_layers(model)
    if args.torch_compile is None:
        if args.device.type != "cuda" or args.use_liger_kernel:
            return None
        if (reason := not_by_default(models, args)) is not None:
            return f"layers are not compiled: {reason}"
    elif not args.torch_compile:
        return None
    elif will_shard(args):
        raise ValueError("torch_compile: expected a model that is whole on every rank, and this one is sharded")
    backend = args.torch_compile_backend or "inductor"
    for model in models:
        compile_layers(model, backend=backend, mode=args.torch_compile_mode, padded=args.padded)
    if args.torch_compile:
        return None
    return "layers are compiled, which takes a minute or two of the first steps (torch_compile=False: not)"


def not_by_default(models: list[Any], args: DPOConfig) -> str | None:
    """Why the layers of these models are compiled on demand only, or None."""
    if will_shard(args) or args.tensor_parallel_size > 1:
        return "the model is sharded"
    if args.padded:
        return "the model runs over padded rows"
    for model in models:
        if not layers_to_compile(model, padded=args.padded):
            return f"{type(model).__name__} is not made of transformers' repeated layers, or of recurrent ones alone"
        if any(is_dispatched(module) for module in model.modules()):
            return "accelerate's hooks move its weights or inputs"
        if getattr(model, "is_quantized", False):
            return "its weights are quantized"
    return None


def will_shard(args: Any) -> bool:
    """Whether accelerate is told to train with FSDP or DeepSpeed, by arguments or by its launcher."""
    return asks_for(args, "fsdp") or asks_for(args, "deepspeed")
