"""Log-probabilities from hidden states and the LM head without writing logits to memory. Forward only.

For hidden states h (N, D), LM head W (V, D) and bias b (V,), and logit_scale, softcap and temperature as in
token_logprobs.py:

    x    = h · Wᵀ + b,   z = softcap · tanh(logit_scale · x / softcap) / temperature
    logp = z_y − m − log S,    m = max z,    S = Σ exp(z − m),    lse = m + log S

1. First kernel: a program handles BLOCK_N rows and one split of the vocabulary. It computes BLOCK_N × BLOCK_V logits by
   tl.dot in float32 accumulators, accumulates them into the running (m, S) of each row, and advances to the next
   columns. It writes (m, S): 8 bytes per row and split. With two columns per tile, z = 1 3 | 2 5 gives (3, 1.14), then
   (5, 1.20).
2. Second kernel: one program per row merges the splits and computes z_y by a separate dot product. Selecting z_y inside
   the tile would take registers that the tile needs, and the 4·N·D bytes read here are few.

float32 inputs are multiplied in full float32 (ieee; the default of tl.dot on NVIDIA is TF32). bfloat16 and float16
products are exact in float32. Everything after the dot is float32; nothing else is rounded. Equal inputs give
bit-identical results: there are no atomics, and the number of splits depends on the shapes and the device only. Bytes:
each row tile reads all of W from L2; row tiles that run at the same time share the reads of W from memory, and their
hidden states stay in L2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .linear_tiles import LinearTile, architecture_of, linear_tile, takes_descriptors, vocab_splits
from .row_parts import FLOAT_DTYPES, LOWEST, scaled_logits, scales
from .tiles import COMPILE_OPTIONS, check_tensor, launch_guard

# L2 size to assume where the device does not report one (XPU): that of an H100.
_CACHE_BYTES = 50 << 20
# Lanes of the target's dot product: each thread loads 16 bytes per step of 16-bit inputs.
BLOCK_TARGET = 1024
TARGET_WARPS = 4


class LinearLogprobs(NamedTuple):
    """Per-row results of :func:`linear_logprobs`, (N,) float32, in nats; both are 0 where ignored.

    Attributes:
        logps: log-probability of the target.
        lse: log Σ exp z, so that the target's z is logps + lse.
    """

    logps: torch.Tensor
    lse: torch.Tensor


@triton.jit
def _fold_tile(
    m,
    s,
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
    scale,
    cap,
    MASKED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return (m, S) updated with columns [first_v, first_v + BLOCK_V). Only a MASKED tile may reach past V."""
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
    z = scaled_logits(acc, scale, cap)[0]
    if MASKED:
        z = tl.where((offs_v < V)[None, :], z, -float("inf"))
    m_new = tl.maximum(m, tl.max(z, 1))
    s = s * tl.exp(m - m_new) + tl.sum(tl.exp(z - m_new[:, None]), 1)
    return m_new, s


@triton.jit(do_not_specialize=["splits"])
def _linear_logprobs_kernel(
    hidden,
    weight,
    bias_ptr,
    row_max_ptr,
    sum_exp_ptr,
    N,
    V,
    D,
    stride_hidden_n,
    stride_weight_v,
    splits,
    scale,
    cap,
    DESCRIPTORS: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Programs start in order: the splits of one row tile, then the next row tile's (linear_tiles.vocab_splits).
    program = tl.program_id(0)
    split = program % splits
    first_n = program // splits * BLOCK_N
    vocab_tiles = tl.cdiv(V, BLOCK_V)
    begin = (split.to(tl.int64) * vocab_tiles // splits).to(tl.int32) * BLOCK_V
    end = ((split + 1).to(tl.int64) * vocab_tiles // splits).to(tl.int32) * BLOCK_V
    full = tl.minimum(end, V // BLOCK_V * BLOCK_V)

    m = tl.full((BLOCK_N,), LOWEST, tl.float32)
    s = tl.zeros((BLOCK_N,), tl.float32)
    # With a flattened loop the loads of the next tile overlap the epilogue of this one. Without descriptors, flattening
    # would make Triton drop the software pipeline.
    for first_v in tl.range(begin, full, BLOCK_V, flatten=DESCRIPTORS):
        m, s = _fold_tile(
            m,
            s,
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
            scale,
            cap,
            False,
            DESCRIPTORS,
            EVEN_D,
            BLOCK_N,
            BLOCK_V,
            BLOCK_D,
        )
    if full < end:
        m, s = _fold_tile(
            m,
            s,
            hidden,
            weight,
            bias_ptr,
            first_n,
            full,
            N,
            V,
            D,
            stride_hidden_n,
            stride_weight_v,
            scale,
            cap,
            True,
            DESCRIPTORS,
            EVEN_D,
            BLOCK_N,
            BLOCK_V,
            BLOCK_D,
        )

    offs_n = first_n + tl.arange(0, BLOCK_N)
    slots = offs_n.to(tl.int64) * splits + split
    tl.store(row_max_ptr + slots, m, mask=offs_n < N)
    tl.store(sum_exp_ptr + slots, s, mask=offs_n < N)


@triton.jit(do_not_specialize=["splits", "ignore_index"])
def _merge_splits_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    row_max_ptr,
    sum_exp_ptr,
    logps_ptr,
    lse_ptr,
    V,
    D,
    stride_hidden_n,
    stride_weight_v,
    splits,
    ignore_index,
    scale,
    cap,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    if target == ignore_index:
        tl.store(logps_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        return

    in_range = (target >= 0) & (target < V)
    safe_target = tl.where(in_range, target, 0)
    lanes = tl.zeros((BLOCK_D,), tl.float32)
    for first_d in range(0, D, BLOCK_D):
        offs_d = first_d + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        h = tl.load(hidden_ptr + row * stride_hidden_n + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + safe_target * stride_weight_v + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        lanes += h * w
    x_target = tl.sum(lanes, 0)
    if bias_ptr is not None:
        x_target += tl.load(bias_ptr + safe_target).to(tl.float32)
    z_target = scaled_logits(x_target, scale, cap)[0]

    offs_s = tl.arange(0, BLOCK_S)
    mask_s = offs_s < splits
    # A split that had no columns wrote (LOWEST, 0).
    m = tl.load(row_max_ptr + row * splits + offs_s, mask=mask_s, other=LOWEST)
    s = tl.load(sum_exp_ptr + row * splits + offs_s, mask=mask_s, other=0.0)
    row_max = tl.max(m, 0)
    sum_exp = tl.sum(s * tl.exp(m - row_max), 0)
    # tl.max ignores NaN but the sums propagate it; S is 0 where all z are −inf, else at least 1.
    row_max = tl.where(in_range & (sum_exp > 0.0), row_max, float("nan"))
    log_sum = tl.log(sum_exp)
    # z_y is summed in another order than in the tile, so near p = 1 rounding may make it exceed lse.
    logp = z_target - row_max - log_sum
    tl.store(logps_ptr + row, tl.where(logp > 0.0, 0.0, logp))
    tl.store(lse_ptr + row, row_max + log_sum)


def _check(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None) -> None:
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


def _describable(tensor: torch.Tensor) -> bool:
    """Whether tensor descriptors can read these rows: each starts 16-byte aligned and they do not overlap."""
    stride = tensor.stride(0)
    return tensor.data_ptr() % 16 == 0 and stride * tensor.element_size() % 16 == 0 and stride >= tensor.shape[1]


def _default_splits(hidden: torch.Tensor, vocab_size: int, tile: LinearTile) -> int:
    """vocab_splits for the device of ``hidden``; 1 in the interpreter, which runs programs sequentially.

    A program's 8 warps use most registers of a multiprocessor, so each multiprocessor runs one program at a time.
    """
    if hidden.device.type == "cpu":
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


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    splits: int | None = None,
    tile: LinearTile | None = None,
    descriptors: bool | None = None,
) -> LinearLogprobs:
    """Log-probability of each row's target from its hidden state and the LM head, without logits in memory.

    A target outside [0, V) that is not ``ignore_index`` gives NaN; so does a row whose z contain NaN or +inf, or are
    all −inf. Other rows are unaffected. Memory beyond the results: 8 bytes per row and split.

    Args:
        hidden: h, (N, D) float32, bfloat16 or float16. Any row stride; copied if the column stride is not 1.
        weight: W, (V, D), of hidden's dtype; strides as for hidden.
        targets: y, (N,) int64.
        bias: b, (V,) in any of the three dtypes.
        logit_scale, softcap, temperature: the maps from x to z (module docstring), finite, the latter two above 0.
        ignore_index: rows with this target get 0, even if their hidden states contain NaN.
        splits: programs that share the vocabulary of one row tile, at least 1; None chooses by shapes and device.
        tile: block sizes; None takes them from the table in linear_tiles.py.
        descriptors: load through tensor descriptors; None: if takes_descriptors says so and the rows are aligned.

    Returns:
        :class:`LinearLogprobs`.

    Raises:
        ValueError: a shape, dtype, device or option is not as above, ``descriptors`` is True and rows do not start at
            multiples of 16 bytes, or the tensors are on the CPU and Triton is not in interpreter mode.
    """
    _check(hidden, weight, targets, bias)
    scale, cap = scales(logit_scale, softcap, temperature)
    if splits is not None and splits < 1:
        raise ValueError(f"splits: expected None or a number from 1 on, got {splits!r}")
    hidden, weight = (rows if rows.stride(1) == 1 else rows.contiguous() for rows in (hidden, weight))
    (N, D), V = hidden.shape, weight.shape[0]
    logps, lse = (torch.empty(N, dtype=torch.float32, device=hidden.device) for _ in range(2))
    if N == 0:
        return LinearLogprobs(logps, lse)

    describable = _describable(hidden) and _describable(weight)
    architecture = architecture_of(hidden.device)
    if descriptors is None:
        descriptors = describable and takes_descriptors(architecture, hidden.dtype)
    elif descriptors and not describable:
        raise ValueError(
            "descriptors: expected rows of hidden and weight that start at multiples of 16 bytes and do not overlap, "
            f"got strides {hidden.stride()} and {weight.stride()} of {hidden.dtype}; leave descriptors at None"
        )
    if tile is None:
        tile = linear_tile(architecture, hidden.dtype, softcap=softcap is not None, descriptors=descriptors)
    if splits is None:
        splits = _default_splits(hidden, V, tile)
    rows: tuple[torch.Tensor | TensorDescriptor, ...] = (hidden, weight)
    if descriptors:
        blocks = ([tile.BLOCK_N, tile.BLOCK_D], [tile.BLOCK_V, tile.BLOCK_D])
        rows = tuple(
            TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)
            for tensor, block in zip((hidden, weight), blocks, strict=True)
        )
    if bias is not None:
        bias = bias.contiguous()
    row_max, sum_exp = (torch.empty(N, splits, dtype=torch.float32, device=hidden.device) for _ in range(2))
    with launch_guard(_linear_logprobs_kernel, hidden, "hidden"):
        _linear_logprobs_kernel[(triton.cdiv(N, tile.BLOCK_N) * splits,)](
            *rows,
            bias,
            row_max,
            sum_exp,
            N,
            V,
            D,
            hidden.stride(0),
            weight.stride(0),
            splits,
            scale,
            cap,
            DESCRIPTORS=descriptors,
            EVEN_D=D % tile.BLOCK_D == 0,
            BLOCK_N=tile.BLOCK_N,
            BLOCK_V=tile.BLOCK_V,
            BLOCK_D=tile.BLOCK_D,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **COMPILE_OPTIONS,
        )
        _merge_splits_kernel[(N,)](
            hidden,
            weight,
            bias,
            targets.contiguous(),
            row_max,
            sum_exp,
            logps,
            lse,
            V,
            D,
            hidden.stride(0),
            weight.stride(0),
            splits,
            ignore_index,
            scale,
            cap,
            BLOCK_D=BLOCK_TARGET,
            BLOCK_S=triton.next_power_of_2(splits),
            num_warps=TARGET_WARPS,
            **COMPILE_OPTIONS,
        )
    return LinearLogprobs(logps, lse)
