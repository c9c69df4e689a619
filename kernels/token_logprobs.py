"""Log-probabilities of target tokens from rows of logits, and their gradient with respect to the logits.

For a row x of logits with bias b (softcap: Gemma 2; logit_scale: Cohere, Granite):

    z    = softcap · tanh(logit_scale · (x + b) / softcap) / temperature
         = logit_scale · (x + b) / temperature               without softcap
    logp = z_y − m − log S,    m = max z,    S = Σ exp(z − m)
    E    = (exp(z − m) − S · onehot(y)) · (1 − tanh²)        = (p − onehot) · S, times softcap's own derivative
    dx   = −g / S · logit_scale / temperature · E            for an upstream gradient g of logp

Logits, bias, E and dx are float32, bfloat16 or float16; all arithmetic and every statistic is float32, and E and dx
are rounded once, when they are stored. In float16, whose largest number E may pass, a row of E is stored as 2ᵏ · E with
2ᵏ · S in [2¹², 2¹³), and rescale belongs to that: probabilities from 2⁻²⁷ on keep all their bits. One program handles a
whole row: results do not depend on N, there are no atomics, and E or dx may overwrite the logits, since a program reads
a block before it writes it and no other program accesses its row.

Bytes moved per logit of b bytes: b for the log-probs alone, 2b + (bytes of E) with E, b + (bytes of dx) for the
gradient. Rows whose target is ignored are not read. If E has a separate buffer, exp_rows.py writes it from one read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .row_parts import (
    FLOAT_DTYPES,
    LOWEST,
    TokenLogprobs,
    check_rows,
    clip,
    fill_row,
    launch_rows,
    raw_logits,
    row_options,
    run_rows,
    scaled_logits,
    store_ignored,
)
from .tiles import check_tensor


@triton.jit
def _float16_scale(sum_exp):
    """The power of two that takes S >= 1 into [2¹², 2¹³), from the exponent's bits; for a NaN any power of two."""
    exponent = (sum_exp.to(tl.int32, bitcast=True) >> 23) & 255
    return (tl.maximum(266 - exponent, 1) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _gradient_row(
    out_ptr,
    row_ptr,
    bias_ptr,
    target,
    row_max,
    sum_exp,
    coefficient,
    stride_v,
    stride_out_v,
    V,
    scale,
    cap,
    BLOCK_V: tl.constexpr,
):
    """Store coefficient · (exp(z − m) − S·onehot) · (1 − tanh²), rounded once; out may be the row itself.

    The target entry is selected inside the tile, because correcting it afterwards would be a second store to the same
    address, which races with the first.
    """
    # Compare in 32 bits: a target that wraps here is out of range, and row_max has made its row NaN.
    target = target.to(tl.int32)
    V_main = V // BLOCK_V * BLOCK_V
    for MASKED in tl.static_range(2):
        for start in range(MASKED * V_main, V if MASKED else V_main, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            mask_v = offs_v < V
            x = raw_logits(row_ptr, bias_ptr, offs_v, mask_v, stride_v, MASKED)
            z, slope = scaled_logits(x, scale, cap)
            e = tl.exp(z - row_max)
            out = coefficient * (tl.where(offs_v == target, e - sum_exp, e) * slope)
            out = out.to(out_ptr.dtype.element_ty)
            if MASKED:
                tl.store(out_ptr + offs_v.to(tl.int64) * stride_out_v, out, mask=mask_v)
            else:
                tl.store(out_ptr + offs_v.to(tl.int64) * stride_out_v, out)


@triton.jit(do_not_specialize=["ignore_index"])
def _token_logprobs_kernel(
    logits_ptr,
    bias_ptr,
    targets_ptr,
    logps_ptr,
    row_max_ptr,
    sum_exp_ptr,
    rescale_ptr,
    entropy_ptr,
    mean_logits_ptr,
    is_top1_ptr,
    log_sum_sq_probs_ptr,
    exp_ptr,
    stride_logits_n,
    stride_logits_v,
    stride_exp_n,
    stride_exp_v,
    V,
    ignore_index,
    scale,
    cap,
    grad_scale,
    BLOCK_V: tl.constexpr,
):
    # Each of the BLOCK_V lanes has a running maximum and running sums, which are merged once per row, so the loop needs
    # no reduction across threads.
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits_n
    target = tl.load(targets_ptr + row).to(tl.int64)

    if target == ignore_index:
        store_ignored(
            row,
            logps_ptr,
            row_max_ptr,
            sum_exp_ptr,
            rescale_ptr,
            entropy_ptr,
            mean_logits_ptr,
            is_top1_ptr,
            log_sum_sq_probs_ptr,
        )
        if exp_ptr is not None:
            fill_row(exp_ptr + row * stride_exp_n, 0.0, stride_exp_v, V, BLOCK_V)
        return

    m = tl.full((BLOCK_V,), LOWEST, tl.float32)
    s = tl.zeros((BLOCK_V,), tl.float32)
    s_shift = tl.zeros((BLOCK_V,), tl.float32)
    s_square = tl.zeros((BLOCK_V,), tl.float32)
    s_logit = tl.zeros((BLOCK_V,), tl.float32)
    first_max = tl.arange(0, BLOCK_V)
    V_main = V // BLOCK_V * BLOCK_V
    for MASKED in tl.static_range(2):
        for start in range(MASKED * V_main, V if MASKED else V_main, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            mask_v = offs_v < V
            x = raw_logits(row_ptr, bias_ptr, offs_v, mask_v, stride_logits_v, MASKED)
            z = scaled_logits(x, scale, cap)[0]
            if MASKED:
                z = tl.where(mask_v, z, -float("inf"))
            # One exponential per entry: where z is a new maximum, e rescales the old sums; elsewhere it is z's term.
            delta = z - m
            e = tl.exp(-tl.abs(delta))
            rises = delta > 0.0
            if entropy_ptr is not None:
                # s_shift = Σ (z − m) exp(z − m); a new maximum lowers every earlier z − m by delta.
                step = clip(delta)
                s_shift = tl.where(rises, e * (s_shift - step * s), s_shift + step * e)
            if log_sum_sq_probs_ptr is not None:
                s_square = tl.where(rises, s_square * e * e + 1.0, s_square + e * e)
            if mean_logits_ptr is not None:
                s_logit += tl.where(mask_v, z, 0.0) if MASKED else z
            if is_top1_ptr is not None:
                first_max = tl.where(rises, offs_v, first_max)
            s = tl.where(rises, s * e + 1.0, s + e)
            m = tl.maximum(m, z)

    # Load the target's logit before the reductions' barriers: after them, another warp may have overwritten it with E.
    in_range = (target >= 0) & (target < V)
    x_target = tl.load(row_ptr + target * stride_logits_v, mask=in_range, other=float("nan")).to(tl.float32)
    if bias_ptr is not None:
        x_target += tl.load(bias_ptr + target, mask=in_range, other=0.0).to(tl.float32)
    z_target = scaled_logits(x_target, scale, cap)[0]

    row_max = tl.max(m, 0)
    delta = m - row_max
    e = tl.exp(delta)
    sum_exp = tl.sum(s * e, 0)
    # tl.max ignores NaN but the sums propagate it; S is 0 where all entries are −inf, else at least 1.
    row_max = tl.where(in_range & (sum_exp > 0.0), row_max, float("nan"))
    log_sum = tl.log(sum_exp)
    tl.store(logps_ptr + row, z_target - row_max - log_sum)
    tl.store(row_max_ptr + row, row_max)
    tl.store(sum_exp_ptr + row, sum_exp)
    unit = 1.0
    if exp_ptr is not None and exp_ptr.dtype.element_ty == tl.float16:
        unit = _float16_scale(sum_exp)
    tl.store(rescale_ptr + row, -grad_scale / (unit * sum_exp))
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, log_sum - tl.sum(e * (s_shift + clip(delta) * s), 0) / sum_exp)
    if mean_logits_ptr is not None:
        tl.store(mean_logits_ptr + row, tl.sum(s_logit, 0) / V)
    if is_top1_ptr is not None:
        argmax = tl.min(tl.where(m == row_max, first_max, V), 0)
        tl.store(is_top1_ptr + row, in_range & (argmax == target))
    if log_sum_sq_probs_ptr is not None:
        tl.store(log_sum_sq_probs_ptr + row, tl.log(tl.sum(s_square * e * e, 0)) - 2.0 * log_sum)
    if exp_ptr is not None:
        _gradient_row(
            exp_ptr + row * stride_exp_n,
            row_ptr,
            bias_ptr,
            target,
            row_max,
            sum_exp,
            unit,
            stride_logits_v,
            stride_exp_v,
            V,
            scale,
            cap,
            BLOCK_V,
        )


@triton.jit(do_not_specialize=["ignore_index"])
def _token_logprobs_grad_kernel(
    logits_ptr,
    bias_ptr,
    targets_ptr,
    row_max_ptr,
    sum_exp_ptr,
    grad_logps_ptr,
    out_ptr,
    stride_logits_n,
    stride_logits_v,
    stride_out_n,
    stride_out_v,
    V,
    ignore_index,
    scale,
    cap,
    grad_scale,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row).to(tl.int64)
    if target == ignore_index:
        fill_row(out_ptr + row * stride_out_n, 0.0, stride_out_v, V, BLOCK_V)
        return
    sum_exp = tl.load(sum_exp_ptr + row)
    _gradient_row(
        out_ptr + row * stride_out_n,
        logits_ptr + row * stride_logits_n,
        bias_ptr,
        target,
        tl.load(row_max_ptr + row),
        sum_exp,
        -grad_scale * tl.load(grad_logps_ptr + row).to(tl.float32) / sum_exp,
        stride_logits_v,
        stride_out_v,
        V,
        scale,
        cap,
        BLOCK_V,
    )


def token_logprobs(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    stats: Sequence[str] = (),
    exp_out: torch.Tensor | None = None,
    out: TokenLogprobs | None = None,
) -> TokenLogprobs:
    """Log-probability of each row's target, optionally with statistics of the row and the row E of its gradient.

    A target outside [0, V) that is not ``ignore_index`` gives NaN in logps, row_max and its row of ``exp_out``; so does
    a row whose z contain NaN or +inf, or are all −inf. Other rows are unaffected. A row with an ignored target is not
    read.

    Args:
        logits: x, (N, V) float32, bfloat16 or float16, any strides. 16-byte loads need a unit column stride and a row
            stride that is a multiple of 16.
        targets: y, (N,) int64.
        bias: b, (V,), added to every row.
        logit_scale, softcap, temperature: the maps from x to z (module docstring), finite, the latter two above 0.
        ignore_index: rows with this target get logp 0, statistics 0 and zeros in ``exp_out``.
        stats: any of "entropy" (of softmax(z), nats), "mean_logits" (mean of z over V), "is_top1" (the target is the
            argmax of z, the first index among equal maxima), "log_sum_sq_probs" (log Σ p², nats).
        exp_out: (N, V), any of the three dtypes and any strides; receives E, in float16 scaled by a power of two a row.
            May be ``logits`` itself but must not overlap it otherwise. E does not include the factor
            logit_scale / temperature of dx.
        out: where to write the results, contiguous (:func:`row_parts.empty_result`, or a part of it); new ones if None.

    Returns:
        :class:`TokenLogprobs`.

    Raises:
        ValueError: a shape, dtype, device, option or name of a statistic is not as above, or out is of other rows or
            statistics.
    """
    check_rows(logits, targets, bias)
    row_map = row_options(logit_scale, softcap, temperature, ignore_index)
    if exp_out is not None:
        check_tensor("exp_out", exp_out, logits.shape, FLOAT_DTYPES, logits.device)
    return launch_rows(_token_logprobs_kernel, logits, targets, bias, exp_out, stats, row_map, out)


def token_logprobs_grad(
    logits: torch.Tensor,
    targets: torch.Tensor,
    row_max: torch.Tensor,
    sum_exp: torch.Tensor,
    grad_logps: torch.Tensor,
    *,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Write g · (onehot − softmax(z)) · dz/dx to out: the gradient of :func:`token_logprobs` in its logits.

    Args:
        logits: x, (N, V) float32, bfloat16 or float16, any strides.
        targets: y, (N,) int64.
        row_max, sum_exp: (N,) float32, as returned by :func:`token_logprobs` for these logits and options.
        grad_logps: g, (N,) float32, bfloat16 or float16.
        out: (N, V), any of the three dtypes and any strides; may be ``logits`` but must not overlap it otherwise.
            Exactly 0 in ignored rows (also where g or x is NaN), NaN where the target is out of range.
        bias, logit_scale, softcap, temperature, ignore_index: as in :func:`token_logprobs`.

    Returns:
        ``out``.

    Raises:
        ValueError: a shape, dtype, device or option is not as above.
    """
    check_rows(logits, targets, bias)
    N, V = logits.shape
    check_tensor("row_max", row_max, (N,), (torch.float32,), logits.device)
    check_tensor("sum_exp", sum_exp, (N,), (torch.float32,), logits.device)
    check_tensor("grad_logps", grad_logps, (N,), FLOAT_DTYPES, logits.device)
    check_tensor("out", out, (N, V), FLOAT_DTYPES, logits.device)
    row_map = row_options(logit_scale, softcap, temperature, ignore_index)
    if N == 0:
        return out
    run_rows(
        _token_logprobs_grad_kernel,
        logits,
        bias.contiguous() if bias is not None else None,
        targets.contiguous(),
        row_max.contiguous(),
        sum_exp.contiguous(),
        grad_logps.contiguous(),
        out,
        *logits.stride(),
        *out.stride(),
        V,
        *row_map,
    )
    return out
