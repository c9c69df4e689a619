"""What the trainer refuses of devices, processes and launchers before it begins."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist

from dpofast.checkpointing.fsdp import check_sharding
from dpofast.training.config import DPOConfig


def check_topology(args: Any) -> None:
    """Look at the trainer's arguments and at the environment of a launcher.

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
