"""Argument checks of the LM-head functions (shapes, dtypes, devices, target values), and the cast under autocast."""

from __future__ import annotations

import torch
from torch import Tensor


def check_target_values(targets: Tensor, vocab: int, ignore_index: int) -> None:
    """Raise ValueError if a target on the CPU is neither in [0, vocab) nor ignore_index.

    Targets on a GPU are not checked, since reading their values would sync the device.
    """
    if targets.is_cpu and targets.numel():
        wrong = ((targets < 0) | (targets >= vocab)) & (targets != ignore_index)
        if wrong.any():
            first = int(wrong.reshape(-1).nonzero()[0])
            raise ValueError(
                f"targets: expected ids in [0, {vocab}) or ignore_index {ignore_index}, "
                f"got {int(targets.reshape(-1)[first])} at position {first}"
            )


def check_tensors(**tensors: object) -> None:
    """Raise TypeError, with the argument's name, for a value that is neither a tensor nor None."""
    for name, value in tensors.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, may_be_empty: bool = False
) -> None:
    """Check hidden (N, D), weight (V, D), bias (V,) or None, and targets (N,) against each other.

    Args:
        hidden: floating point, of 16, 32 or 64 bits.
        weight: of hidden's dtype and device.
        bias: of hidden's dtype and device, or None.
        targets: int64 on hidden's device.
        may_be_empty: allow V = 0: with the vocabulary sharded over ranks, a rank may have no rows.

    Raises:
        TypeError: weight or bias is not a plain dense tensor (it is quantized, sharded or sparse).
        ValueError: shapes, dtypes or devices do not match.
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
    """Raise ValueError unless targets are int64 on `device`. check_target_values checks their values."""
    if targets.dtype != torch.int64:
        raise ValueError(f"targets: expected int64, got {targets.dtype}")
    if targets.device != device:
        raise ValueError(f"targets: expected on {device}, got {targets.device}")


def autocast_inputs(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return hidden, weight and bias in autocast's dtype if autocast is enabled, else unchanged.

    The functions that run inside a call cast nothing themselves.
    """
    if not torch.is_autocast_enabled(hidden.device.type):
        return hidden, weight, bias
    compute = torch.get_autocast_dtype(hidden.device.type)
    return hidden.to(compute), weight.to(compute), None if bias is None else bias.to(compute)


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless the tensor is float16, bfloat16, float32 or float64."""
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"{name}: expected a floating-point tensor of 16, 32 or 64 bits, got {tensor.dtype}")
