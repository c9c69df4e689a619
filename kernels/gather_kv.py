"""K/V rows of a packed batch, copied for every run of queries that attends to them, and the sums of their gradients.

A run's keys are the rows that its sequences begin with and its own, and FlashAttention takes them as consecutive rows.
T rows of K and V become one row for each of K keys, and the gradients of a row's copies are added up:

    key_out[j]  = key[rows[j]]                                    forward, j in 0..K-1
    key_grad[t] = Σ_j∈copies(t) grad_key_out[j]                   backward, copies(t) = {j : rows[j] = t}

Example: a prompt of two rows with branches of two and one rows has rows = 0 1 2 3 | 0 1 4: row 0 has the copies 0 and
4. copies lists the j of row 0, then those of row 1 and so on; row t's are copies[offsets[t]:offsets[t + 1]].

A program copies or adds BLOCK rows of one head, K and V both. The backward adds in float32, in the order of copies, and
writes every row once: no atomics, so equal inputs give equal bits.

Bytes moved for K and V together, of H heads of D numbers of b bytes: forward 4·K·H·D·b, of which rows that are read
again may come from the cache; backward 2·(K + T)·H·D·b.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .tiles import COMPILE_OPTIONS, check_tensor, launch_guard

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Entries of K, and as many of V, that a program holds: in 16 bits two 16-byte loads of each per thread.
TILE, WARPS = 2048, 4


@triton.jit(do_not_specialize=["K"])
def _gather_kv_kernel(
    key_ptr,
    value_ptr,
    rows_ptr,
    key_out_ptr,
    value_out_ptr,
    stride_key_t,
    stride_key_h,
    stride_value_t,
    stride_value_h,
    K,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Heads vary fastest, so that the programs of one row run together.
    head = tl.program_id(0) % H
    offs_k = (tl.program_id(0) // H).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask_k = offs_k < K
    mask = mask_k[:, None] & (offs_d < D)
    row = tl.load(rows_ptr + offs_k, mask=mask_k, other=0).to(tl.int64)[:, None]
    key = tl.load(key_ptr + (row * stride_key_t + head.to(tl.int64) * stride_key_h + offs_d), mask=mask)
    value = tl.load(value_ptr + (row * stride_value_t + head.to(tl.int64) * stride_value_h + offs_d), mask=mask)
    out = (offs_k[:, None] * H + head) * D + offs_d
    tl.store(key_out_ptr + out, key, mask=mask)
    tl.store(value_out_ptr + out, value, mask=mask)


@triton.jit(do_not_specialize=["T"])
def _sum_kv_kernel(
    grad_key_ptr,
    grad_value_ptr,
    offsets_ptr,
    copies_ptr,
    key_grad_ptr,
    value_grad_ptr,
    T,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = tl.program_id(0) % H
    offs_t = (tl.program_id(0) // H).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask_t, mask_d = offs_t < T, offs_d < D
    first = tl.load(offsets_ptr + offs_t, mask=mask_t, other=0).to(tl.int64)
    stop = tl.load(offsets_ptr + (offs_t + 1), mask=mask_t, other=0).to(tl.int64)
    key_sum = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    value_sum = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for i in range(tl.max(stop - first, 0)):
        mask_i = first + i < stop
        copy = tl.load(copies_ptr + (first + i), mask=mask_i, other=0).to(tl.int64)[:, None]
        at = (copy * H + head) * D + offs_d
        key_sum += tl.load(grad_key_ptr + at, mask=mask_i[:, None] & mask_d, other=0.0).to(tl.float32)
        value_sum += tl.load(grad_value_ptr + at, mask=mask_i[:, None] & mask_d, other=0.0).to(tl.float32)
    out = (offs_t[:, None] * H + head) * D + offs_d
    # The only rounding of a sum in 16 bits.
    tl.store(key_grad_ptr + out, key_sum.to(key_grad_ptr.dtype.element_ty), mask=mask_t[:, None] & mask_d)
    tl.store(value_grad_ptr + out, value_sum.to(value_grad_ptr.dtype.element_ty), mask=mask_t[:, None] & mask_d)


def tile(width: int) -> tuple[int, int]:
    """(rows, columns) of a program's tile: a head's width rounded up to a power of two, and the rows that fit."""
    columns = triton.next_power_of_2(width)
    return max(1, TILE // columns), columns


def gather_kv(key: torch.Tensor, value: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy the rows of K and V for their readers, in one launch.

    Args:
        key: (T, H, D) float32, bfloat16 or float16, any strides of T and H.
        value: as key.
        rows: (K,) int32, in 0..T-1.

    Returns:
        key[rows] and value[rows], (K, H, D) contiguous.

    Raises:
        ValueError: a shape, dtype or device is wrong.
    """
    _check("key", key)
    check_tensor("value", value, key.shape, (key.dtype,), key.device)
    check_tensor("rows", rows, (rows.numel(),), (torch.int32,), key.device)
    key, value = (tensor if tensor.stride(2) == 1 else tensor.contiguous() for tensor in (key, value))
    keys, (_, heads, width) = len(rows), key.shape
    key_out, value_out = (key.new_empty(keys, heads, width) for _ in range(2))
    if key_out.numel() == 0:
        return key_out, value_out
    block, columns = tile(width)
    with launch_guard(_gather_kv_kernel, key, "key"):
        _gather_kv_kernel[(triton.cdiv(keys, block) * heads,)](
            key, value, rows.contiguous(), key_out, value_out, *key.stride()[:2], *value.stride()[:2], keys,
            H=heads, D=width, BLOCK_K=block, BLOCK_D=columns, num_warps=WARPS, **COMPILE_OPTIONS,
        )  # fmt: skip
    return key_out, value_out


def sum_kv(
    grad_key: torch.Tensor, grad_value: torch.Tensor, offsets: torch.Tensor, copies: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the gradients of every row's copies, in float32 and in a fixed order, in one launch.

    Args:
        grad_key: (K, H, D) float32, bfloat16 or float16.
        grad_value: as grad_key.
        offsets: (T + 1,) int32; row t's copies are copies[offsets[t]:offsets[t + 1]].
        copies: (K,) int32, in 0..K-1.

    Returns:
        The gradients of key and value, (T, H, D) contiguous, in grad_key's dtype; 0 for a row without copies.

    Raises:
        ValueError: a shape, dtype or device is wrong.
    """
    _check("grad_key", grad_key)
    check_tensor("grad_value", grad_value, grad_key.shape, (grad_key.dtype,), grad_key.device)
    check_tensor("offsets", offsets, (max(1, offsets.numel()),), (torch.int32,), grad_key.device)
    check_tensor("copies", copies, grad_key.shape[:1], (torch.int32,), grad_key.device)
    rows, (_, heads, width) = len(offsets) - 1, grad_key.shape
    key_grad, value_grad = (grad_key.new_empty(rows, heads, width) for _ in range(2))
    if key_grad.numel() == 0:
        return key_grad, value_grad
    block, columns = tile(width)
    inputs = (tensor.contiguous() for tensor in (grad_key, grad_value, offsets, copies))
    with launch_guard(_sum_kv_kernel, grad_key, "grad_key"):
        _sum_kv_kernel[(triton.cdiv(rows, block) * heads,)](
            *inputs, key_grad, value_grad, rows,
            H=heads, D=width, BLOCK_T=block, BLOCK_D=columns, num_warps=WARPS, **COMPILE_OPTIONS,
        )  # fmt: skip
    return key_grad, value_grad


def _check(name: str, rows: torch.Tensor) -> None:
    if rows.dim() != 3 or rows.dtype not in DTYPES:
        raise ValueError(
            f"{name}: expected (rows, heads, head_dim) in float32, bfloat16 or float16, got {tuple(rows.shape)} "
            f"{rows.dtype}"
        )
