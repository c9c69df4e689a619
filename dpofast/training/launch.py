"""Checks of devices, processes and launchers, and the trainer's own copy of its arguments."""

from __future__ import annotations

import copy
import os
import warnings
from typing import Any

import torch.distributed as dist

from dpofast.training.config import DPOConfig
from dpofast.training.fsdp import check_sharding


def own_arguments(args: DPOConfig | None) -> DPOConfig:
    """Returns a checked copy of the trainer's arguments, with gradient accumulation folded into the batch size.

    The trainer divides a step into micro-batches itself, so transformers' Trainer sees one batch a step.

    Raises:
        ValueError: what check_topology refuses.
    """
    args = DPOConfig(output_dir="dpofast-output") if args is None else copy.copy(args)
    check_topology(args)
    args.per_device_train_batch_size *= args.gradient_accumulation_steps
    args.gradient_accumulation_steps = 1
    args.dataloader_pin_memory = False  # batches are numpy arrays until they are packed
    return args


def check_topology(args: Any) -> None:
    """Check the trainer's arguments against the processes and the environment of a launcher.

    Raises:
        ValueError: no DPOConfig, or one made for another number of processes; several GPUs in one process; accelerate's
            own compiler; what check_sharding refuses.
    """
    if not isinstance(args, DPOConfig):
        raise ValueError(f"args: expected a DPOConfig, got {type(args).__name__}")
    if args.n_gpu > 1:
        raise ValueError(f"DPOTrainer uses one GPU, and {args.n_gpu} are visible: set CUDA_VISIBLE_DEVICES")
    if dist.is_initialized() and dist.get_world_size() > 1 and args.world_size == 1:
        raise ValueError(
            f"args: expected {dist.get_world_size()} processes that train together, as torch.distributed has been "
            "initialized, got a DPOConfig made for one: make it under the launcher (torchrun), with use_cpu on a CPU"
        )
    if (compiler := os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()) != "no":
        raise ValueError(
            f"dynamo_backend: expected no, got {compiler}: accelerate would compile the whole model, anew for every "
            "batch; set torch_compile, which compiles its layers"
        )
    check_sharding(args)


def check_options_of_sharded(args: DPOConfig) -> None:
    """Refuse options that need a model which is whole on every rank; for FSDP and DeepSpeed.

    Raises:
        ValueError: torch_compile, sync_ref_model or max_tokens="auto".
    """
    if args.torch_compile:
        raise ValueError("torch_compile: expected a model that is whole on every rank, and this one is sharded")
    if args.sync_ref_model:
        raise ValueError("sync_ref_model: expected a policy that is whole on every rank, and this one is sharded")
    if args.max_tokens == "auto":
        raise ValueError("max_tokens: 'auto' cannot probe a model that is sharded later; give a number")


def check_pairs_per_step(num_pairs: int, args: DPOConfig, num_ranks: int) -> None:
    """Refuse dataloader_drop_last where it would leave no step.

    Raises:
        ValueError: fewer pairs than a step has.
    """
    step = args.per_device_train_batch_size * num_ranks
    if args.dataloader_drop_last and num_pairs < step:
        raise ValueError(
            f"dataloader_drop_last: {num_pairs} pairs are fewer than the {step} of a step, so nothing would be "
            "trained: leave it off, or set a smaller per_device_train_batch_size"
        )


def warn_of_long_pairs(longest: int, args: DPOConfig) -> None:
    """Warn where a pair has more positions than max_tokens, which then does not bound a micro-batch.

    Args:
        longest: positions of the longest pair by itself.
        args: the trainer's.
    """
    if isinstance(args.max_tokens, int) and longest > args.max_tokens:
        warnings.warn(
            f"max_tokens: {args.max_tokens} is less than the longest pair has, {longest} positions: such a pair runs "
            "alone, and takes the memory of all its positions. A smaller max_length cuts it",
            stacklevel=3,
        )
