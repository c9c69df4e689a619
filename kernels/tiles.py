"""Launch settings shared by the kernels: tile sizes by vocabulary and backend, compiler options, argument checks.

A row kernel reads one row of logits (V entries) per program in tiles of BLOCK_V columns. 256 threads with 8 columns
each load 16 (16-bit) or 32 bytes (float32) per thread and step. They need at most 48 registers (about 100 with every
statistic), so five or more programs share a multiprocessor and hide memory latency.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton

# Contracting x*scale - m into a fused multiply-add would leave the rounding error of x*scale in the exponent of the
# row's largest term, which must be exp(0) = 1. Set explicitly because Triton's default differs between releases.
COMPILE_OPTIONS = {"enable_fp_fusion": False}


@dataclass(frozen=True)
class RowTile:
    """Columns per step and warps per program of a row kernel."""

    BLOCK_V: int
    num_warps: int


def row_tile(vocab_size: int, backend: str = "cuda") -> RowTile:
    """Return the tile for rows of ``vocab_size`` columns on a Triton backend ("cuda" or "hip").

    A vocabulary of at most 256 takes one warp: a wider tile would be mostly masked, and one warp needs no barrier to
    reduce.
    """
    if vocab_size <= 256:
        return RowTile(BLOCK_V=256, num_warps=1)
    return RowTile(BLOCK_V=2048, num_warps=4 if backend == "hip" else 8)


def backend_of(tensor: torch.Tensor) -> str:
    """Triton's name of the backend for ``tensor``'s device: "hip" on ROCm, else "cuda" (also in the interpreter)."""
    return "hip" if tensor.device.type == "cuda" and torch.version.hip else "cuda"


def launch_guard(kernel: Any, tensor: torch.Tensor, name: str) -> AbstractContextManager[Any]:
    """Context manager that makes ``tensor``'s device current, since Triton launches on the current device.

    Raises:
        ValueError: ``tensor`` is on the CPU and Triton is not in interpreter mode.
    """
    if tensor.device.type != "cpu":
        return getattr(torch, tensor.device.type).device(tensor.device)
    if isinstance(kernel, triton.JITFunction):
        raise ValueError(
            f"{name}: expected a tensor on a GPU, got one on the CPU. Use the torch backend there, or set "
            "TRITON_INTERPRET=1 before triton is first imported to run this kernel in the interpreter."
        )
    return nullcontext()


def check_tensor(
    name: str, tensor: torch.Tensor, shape: Sequence[int], dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    """Raise ValueError unless ``tensor`` has this shape, one of these dtypes and this device."""
    if tensor.shape != tuple(shape) or tensor.dtype not in dtypes or tensor.device != device:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{name}: expected {tuple(shape)} {expected} on {device} to match the other arguments, "
            f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        )
