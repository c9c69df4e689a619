"""Shared code of the kernels that multiply hidden states with the LM head: one tile of logits, checks and launch.

Symbols are those of exp_gemm.py. float32 inputs are multiplied in full float32 (ieee; the default of tl.dot on
NVIDIA is TF32). bfloat16 and float16 products are exact in float32, and everything after the dot is float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .linear_tiles import LinearTile, architecture_of, linear_tile, takes_descriptors, vocab_splits
from .row_parts import FLOAT_DTYPES
from .tiles import COMPILE_OPTIONS, check_tensor

# L2 size to assume where the device does not report one (XPU): that of an H100.
_CACHE_BYTES = 50 << 20


@triton.jit
def tile_logits(
    hidden,
    weight,
    bias_ptr,
    first_n,
    first_v,
    N,
    V,
    D,
    stride_hidden_n,
    stride_weight_v,
    MASKED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return x + b of rows from first_n and columns from first_v on. Only a MASKED tile may reach past V.

    Rows past N and columns past V hold any finite or infinite values.
    """
    offs_v = first_v + tl.arange(0, BLOCK_V)
    acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    if DESCRIPTORS:
        # Elements outside the tensors are read as 0.
        for first_d in range(0, D, BLOCK_D):
            h = hidden.load([first_n, first_d])
            w = weight.load([first_v, first_d])
            acc = tl.dot(h, w.T, acc, input_precision="ieee")
    else:
        # Rows past N and columns past V reread the last one, so that loads need no mask; their results are unused.
        rows_n = tl.minimum(first_n + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
        rows_v = (tl.minimum(offs_v, V - 1) if MASKED else offs_v).to(tl.int64)
        offs_d = tl.arange(0, BLOCK_D)
        h_ptrs = hidden + rows_n[:, None] * stride_hidden_n + offs_d[None, :]
        w_ptrs = weight + rows_v[None, :] * stride_weight_v + offs_d[:, None]
        for first_d in range(0, D, BLOCK_D):
            if EVEN_D:
                h = tl.load(h_ptrs)
                w = tl.load(w_ptrs)
            else:
                h = tl.load(h_ptrs, mask=offs_d[None, :] < D - first_d, other=0.0)
                w = tl.load(w_ptrs, mask=offs_d[:, None] < D - first_d, other=0.0)
            acc = tl.dot(h, w, acc, input_precision="ieee")
            h_ptrs += BLOCK_D
            w_ptrs += BLOCK_D
    if bias_ptr is not None:
        if MASKED:
            acc += tl.load(bias_ptr + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)[None, :]
        else:
            acc += tl.load(bias_ptr + offs_v).to(tl.float32)[None, :]
    return acc


@triton.jit
def split_columns(split, splits, V, BLOCK_V: tl.constexpr):
    """Return (begin, full, end) of a split's columns: whole tiles up to full, and from there to end a MASKED one."""
    vocab_tiles = tl.cdiv(V, BLOCK_V)
    begin = (split.to(tl.int64) * vocab_tiles // splits).to(tl.int32) * BLOCK_V
    end = ((split + 1).to(tl.int64) * vocab_tiles // splits).to(tl.int32) * BLOCK_V
    return begin, tl.minimum(end, V // BLOCK_V * BLOCK_V), end


def check_linear(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raise ValueError unless hidden (N, D), weight (V, D), targets (N,) and bias (V,) match as the kernels need it."""
    if hidden.dim() != 2 or hidden.shape[1] == 0 or hidden.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"hidden: expected (N, D) with D >= 1 in float32, bfloat16 or float16, got {tuple(hidden.shape)} "
            f"{hidden.dtype}; flatten leading dimensions, and use the reference for float64"
        )
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight: expected (V, D) with V >= 1, got {tuple(weight.shape)}")
    check_tensor("weight", weight, (weight.shape[0], hidden.shape[1]), (hidden.dtype,), hidden.device)
    check_tensor("targets", targets, hidden.shape[:1], (torch.int64,), hidden.device)
    if bias is not None:
        check_tensor("bias", bias, weight.shape[:1], FLOAT_DTYPES, hidden.device)


def describable(tensor: torch.Tensor) -> bool:
    """Whether tensor descriptors can read or write these rows: each starts 16-byte aligned and they do not overlap."""
    stride = tensor.stride(0)
    return tensor.data_ptr() % 16 == 0 and stride * tensor.element_size() % 16 == 0 and stride >= tensor.shape[1]


def described(tensor: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """The descriptor of a matrix that is read or written in blocks of (rows, columns)."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns])


@dataclass(frozen=True)
class LinearLaunch:
    """How hidden (N, D), N >= 1, and weight (V, D), both with a column stride of 1, are given to a kernel.

    Attributes:
        hidden, weight: the tensors.
        descriptors: whether tiles are loaded through tensor descriptors.
        tile: block sizes.
        splits: programs that share the vocabulary of one row tile.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    descriptors: bool
    tile: LinearTile
    splits: int

    @staticmethod
    def make(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        exp: torch.Tensor | None,
        *,
        softcap: bool,
        splits: int | None,
        tile: LinearTile | None,
        descriptors: bool | None,
    ) -> LinearLaunch:
        """Choose what is None by architecture, alignment and shapes.

        exp: (N, V) where tiles are stored, or None. softcap: whether the epilogue applies it.

        Raises:
            ValueError: splits is below 1, or ``descriptors`` is True and rows do not start at multiples of 16 bytes.
        """
        if splits is not None and splits < 1:
            raise ValueError(f"splits: expected None or a number from 1 on, got {splits!r}")
        rows = {
            name: tensor
            for name, tensor in (("hidden", hidden), ("weight", weight), ("exp_out", exp))
            if tensor is not None
        }
        aligned = all(map(describable, rows.values()))
        architecture = architecture_of(hidden.device)
        if descriptors is None:
            # A tile of E in float32 beside the pipeline's would not fit into shared memory.
            narrow = exp is None or exp.element_size() == 2
            descriptors = aligned and narrow and takes_descriptors(architecture, hidden.dtype)
        elif descriptors and not aligned:
            got = ", ".join(f"{name} with strides {row.stride()} of {row.dtype}" for name, row in rows.items())
            raise ValueError(
                "descriptors: expected rows that start at multiples of 16 bytes and do not overlap, got "
                f"{got}; leave descriptors at None"
            )
        if tile is None:
            even = aligned and hidden.shape[1] % 64 == 0
            tile = linear_tile(
                architecture, hidden.dtype, softcap=softcap, descriptors=descriptors, stores=exp is not None, even=even
            )
        if splits is None:
            splits = _default_splits(hidden, weight.shape[0], tile)
        return LinearLaunch(hidden, weight, descriptors, tile, splits)

    @property
    def grid(self) -> tuple[int]:
        """Programs: the splits of one row tile, then the next row tile's."""
        return (triton.cdiv(self.hidden.shape[0], self.tile.BLOCK_N) * self.splits,)

    @property
    def operands(self) -> tuple[Any, Any]:
        """Hidden states and weight as the kernel takes them."""
        if not self.descriptors:
            return self.hidden, self.weight
        tile = self.tile
        return described(self.hidden, tile.BLOCK_N, tile.BLOCK_D), described(self.weight, tile.BLOCK_V, tile.BLOCK_D)

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """N, V, D, the row strides of hidden and weight, splits."""
        (N, D), V = self.hidden.shape, self.weight.shape[0]
        return N, V, D, self.hidden.stride(0), self.weight.stride(0), self.splits

    @property
    def constants(self) -> dict[str, Any]:
        """Compile-time arguments and options."""
        tile = self.tile
        return {
            "DESCRIPTORS": self.descriptors,
            "EVEN_D": self.hidden.shape[1] % tile.BLOCK_D == 0,
            "BLOCK_N": tile.BLOCK_N,
            "BLOCK_V": tile.BLOCK_V,
            "BLOCK_D": tile.BLOCK_D,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
            **COMPILE_OPTIONS,
        }


def _default_splits(hidden: torch.Tensor, vocab_size: int, tile: LinearTile) -> int:
    """vocab_splits for the device of ``hidden``; 1 in the interpreter, which runs programs sequentially, and on meta.

    A program's 8 warps use most registers of a multiprocessor, so each multiprocessor runs one program at a time.
    """
    if hidden.device.type in ("cpu", "meta"):
        return 1
    properties = getattr(torch, hidden.device.type).get_device_properties(hidden.device)
    processors = getattr(properties, "multi_processor_count", None) or properties.gpu_subslice_count
    return vocab_splits(
        triton.cdiv(hidden.shape[0], tile.BLOCK_N),
        triton.cdiv(vocab_size, tile.BLOCK_V),
        processors,
        tile.BLOCK_N * hidden.shape[1] * hidden.element_size(),
        getattr(properties, "L2_cache_size", None) or _CACHE_BYTES,
    )
