"""Checks of the arguments of the LM-head functions: shapes, dtypes, devices and target values."""

from __future__ import annotations

import torch
from torch import Tensor


def check_target_values(targets: Tensor, vocab: int, ignore_index: int) -> None:
    """ValueError for a target outside [0, vocab) that is not ignore_index: on the CPU, where looking costs no sync."""
    if targets.is_cpu and targets.numel():
        wrong = ((targets < 0) | (targets >= vocab)) & (targets != ignore_index)
        if wrong.any():
            first = int(wrong.reshape(-1).nonzero()[0])
            raise ValueError(
                f"targets: expected ids in [0, {vocab}) or ignore_index {ignore_index}, "
                f"got {int(targets.reshape(-1)[first])} at position {first}"
            )


def check_tensors(**tensors: object) -> None:
    """TypeError for an argument, named, that is neither a tensor nor None."""
    for name, value in tensors.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, may_be_empty: bool = False
) -> None:
    """TypeError for a head that is no plain dense tensor, ValueError for shapes, dtypes or devices that do not fit.

    may_be_empty: the weight may be without rows, as a shard is that got none.
    """
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (type(tensor.data) is not Tensor or tensor.layout != torch.strided):
            raise TypeError(
                f"{name}: expected a plain dense tensor, got {type(tensor.data).__name__} ({tensor.layout}): "
                "gather or dequantize the head first"
            )
    check_floating("hidden", hidden)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden (N, D) and weight (V, D): expected equal D, got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if weight.shape[0] == 0 and not may_be_empty:
        raise ValueError(f"weight (V, D): expected a vocabulary of at least one word, got {tuple(weight.shape)}")
    check_targets(targets, hidden.device)
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets: expected shape ({hidden.shape[0]},), got {tuple(targets.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype != hidden.dtype or tensor.device != hidden.device):
            raise ValueError(
                f"{name}: expected hidden's dtype and device, {hidden.dtype} on {hidden.device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )


def check_targets(targets: Tensor, device: torch.device) -> None:
    """ValueError unless targets are int64 on the device; their values are looked at by check_target_values."""
    if targets.dtype != torch.int64:
        raise ValueError(f"targets: expected int64, got {targets.dtype}")
    if targets.device != device:
        raise ValueError(f"targets: expected on {device}, got {targets.device}")


def autocast_inputs(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The head's float inputs in autocast's dtype where it is on: cast here, once, and never inside."""
    if not torch.is_autocast_enabled(hidden.device.type):
        return hidden, weight, bias
    compute = torch.get_autocast_dtype(hidden.device.type)
    return hidden.to(compute), weight.to(compute), None if bias is None else bias.to(compute)


def check_floating(name: str, tensor: Tensor) -> None:
    """ValueError unless the tensor's dtype is one that the engine computes with."""
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"{name}: expected a floating-point tensor of 16, 32 or 64 bits, got {tensor.dtype}")
