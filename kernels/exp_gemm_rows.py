"""The kernels beside the GEMM of exp_gemm.py: the guess of each row's shift, its results, and its second shift.

Symbols are those of exp_gemm.py. Each row has `slots` candidates for its shift c, of which the largest is taken: the
target's z · log2(e), and the maximum of each block of sampled columns.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from .linear_parts import tile_logits
from .row_parts import LOWEST, clip, fill_row, tanh

LN_2 = tl.constexpr(math.log(2.0))


@triton.jit
def exponents(x, shift, scale, cap):
    """Return a = z · log2(e) − shift, rounded once, and softcap's factor of dz/dx."""
    slope = 1.0
    factor = scale
    if cap is not None:
        x, slope = tanh(x * scale)
        factor = cap
    return tl.fma(x, factor, -shift), slope


@triton.jit
def row_shift(guess_ptr, rows, mask, slots, BLOCK_G: tl.constexpr):
    """Return c of rows (R,): the largest of each row's slots."""
    offs_g = tl.arange(0, BLOCK_G)
    guesses = tl.load(
        guess_ptr + rows.to(tl.int64)[:, None] * slots + offs_g[None, :],
        mask=mask[:, None] & (offs_g < slots)[None, :],
        other=LOWEST,
    )
    return tl.max(guesses, 1)


@triton.jit(do_not_specialize=["slots", "ignore_index"])
def guess_kernel(
    hidden_ptr,
    sample_ptr,
    sample_bias_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    guess_ptr,
    target_logit_ptr,
    flags_ptr,
    N,
    V,
    D,
    samples,
    stride_hidden_n,
    stride_sample_v,
    stride_weight_v,
    slots,
    ignore_index,
    scale,
    cap,
    raised,
    EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the slots of each row, its target's x and whether it counts."""
    # The last program of a row tile has its targets, the others BLOCK_V sampled columns each.
    slot = tl.program_id(0) % slots
    first_n = tl.program_id(0) // slots * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    if slot == slots - 1:
        targets = tl.load(targets_ptr + offs_n, mask=mask_n, other=0)
        in_range = (targets >= 0) & (targets < V)
        rows_h = hidden_ptr + tl.minimum(offs_n, N - 1).to(tl.int64)[:, None] * stride_hidden_n
        rows_w = weight_ptr + tl.where(in_range, targets, 0)[:, None] * stride_weight_v
        lanes = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for first_d in range(0, D, BLOCK_D):
            offs_d = (first_d + tl.arange(0, BLOCK_D))[None, :]
            h = tl.load(rows_h + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
            w = tl.load(rows_w + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
            lanes += h * w
        x_target = tl.sum(lanes, 1)
        if bias_ptr is not None:
            x_target += tl.load(bias_ptr + targets, mask=in_range, other=0.0).to(tl.float32)
        tl.store(target_logit_ptr + offs_n, x_target, mask=mask_n)
        tl.store(flags_ptr + offs_n, (in_range & (targets != ignore_index)).to(tl.int8), mask=mask_n)
        guess = exponents(x_target, 0.0, scale, cap)[0]
    else:
        x = tile_logits(
            hidden_ptr,
            sample_ptr,
            sample_bias_ptr,
            first_n,
            slot * BLOCK_V,
            N,
            samples,
            D,
            stride_hidden_n,
            stride_sample_v,
            True,
            False,
            EVEN_D,
            BLOCK_N,
            BLOCK_V,
            BLOCK_D,
        )
        sampled = slot * BLOCK_V + tl.arange(0, BLOCK_V) < samples
        guess = tl.max(tl.where(sampled[None, :], exponents(x, 0.0, scale, cap)[0], LOWEST), 1)
    # Finite, so that z − c is never inf − inf; Triton's maximum drops NaN.
    tl.store(guess_ptr + offs_n.to(tl.int64) * slots + slot, clip(guess) - raised, mask=mask_n)


@triton.jit(
    do_not_specialize=["splits", "slots", "ignore_index"], do_not_specialize_on_alignment=["flags_ptr", "again_ptr"]
)
def patch_kernel(
    targets_ptr,
    target_logit_ptr,
    guess_ptr,
    sum_exp_ptr,
    flags_ptr,
    again_ptr,
    exp_ptr,
    logps_ptr,
    lse_ptr,
    rescale_ptr,
    N,
    V,
    stride_exp_n,
    splits,
    slots,
    ignore_index,
    scale,
    cap,
    grad_scale,
    least,
    most,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Write a row's results and E's target entry, and flag the row if its shift was bad."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    if target == ignore_index:
        tl.store(logps_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        tl.store(rescale_ptr + row, 0.0)
        tl.store(again_ptr + row, 0)
        if exp_ptr is not None:
            fill_row(exp_ptr + row * stride_exp_n, 0.0, 1, V, BLOCK_V)
        return
    # The rows beside a flagged one in its tile lost their target's entry.
    offs_n = (row // BLOCK_N * BLOCK_N).to(tl.int32) + tl.arange(0, BLOCK_N)
    flagged = tl.max(tl.load(flags_ptr + offs_n, mask=offs_n < N, other=0).to(tl.int32), 0) > 0
    in_range = (target >= 0) & (target < V)
    if in_range & (not flagged):
        return

    offs_s = tl.arange(0, BLOCK_S)
    sum_exp = tl.sum(tl.load(sum_exp_ptr + row * splits + offs_s, mask=offs_s < splits, other=0.0), 0)
    offs_g = tl.arange(0, BLOCK_G)
    shift = tl.max(tl.load(guess_ptr + row * slots + offs_g, mask=offs_g < slots, other=LOWEST), 0)
    exponent, slope = exponents(tl.load(target_logit_ptr + row), shift, scale, cap)
    # S is NaN or inf if the row holds one or c was too low, and 0 if all z are −inf.
    whole = in_range & (sum_exp > 0.0) & (sum_exp < float("inf"))
    log_sum = tl.where(whole, tl.log2(sum_exp), float("nan"))
    # z_y is summed in another order than in the tile, so near p = 1 rounding may make it exceed lse.
    logp = (exponent - log_sum) * LN_2
    tl.store(logps_ptr + row, tl.where(logp > 0.0, 0.0, logp))
    tl.store(lse_ptr + row, (shift + log_sum) * LN_2)
    tl.store(rescale_ptr + row, tl.where(whole, -grad_scale / sum_exp, float("nan")))
    # The comparisons are false for NaN. A target out of range stays NaN whatever c is.
    tl.store(again_ptr + row, (in_range & (not ((log_sum >= least) & (log_sum <= most)))).to(tl.int8))
    if exp_ptr is not None:
        exp_row_ptr = exp_ptr + row * stride_exp_n
        if whole:
            rest = tl.exp2(exponent) - sum_exp
            tl.store(exp_row_ptr + target, (tl.where(rest > 0.0, 0.0, rest) * slope).to(exp_ptr.dtype.element_ty))
        else:
            fill_row(exp_row_ptr, float("nan"), 1, V, BLOCK_V)


@triton.jit(do_not_specialize=["splits", "slots"], do_not_specialize_on_alignment=["flags_ptr"])
def reshift_kernel(
    flags_ptr,
    row_max_ptr,
    sum_exp_ptr,
    guess_ptr,
    splits,
    slots,
    raised,
    log2_e,
    BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Make log2 Σ exp z the shift of a flagged row."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(flags_ptr + row) == 0:
        return
    offs_s = tl.arange(0, BLOCK_S)
    m = tl.load(row_max_ptr + row * splits + offs_s, mask=offs_s < splits, other=LOWEST)
    s = tl.load(sum_exp_ptr + row * splits + offs_s, mask=offs_s < splits, other=0.0)
    row_max = tl.max(m, 0)
    lse = row_max + tl.log(tl.sum(s * tl.exp(m - row_max), 0))
    offs_g = tl.arange(0, BLOCK_G)
    shift = tl.zeros((BLOCK_G,), tl.float32) + (clip(lse * log2_e) - raised)
    tl.store(guess_ptr + row * slots + offs_g, shift, mask=offs_g < slots)
