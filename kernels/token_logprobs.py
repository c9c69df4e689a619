"""Log-probabilities of target tokens from rows of logits, and the gradient of the same rows.

For a row x of logits, with bias b, and the maps of the model families (softcap: Gemma 2; logit_scale: Cohere, Granite):

    z    = softcap · tanh(logit_scale · (x + b) / softcap) / temperature
         = logit_scale · (x + b) / temperature               without softcap
    logp = z_y − m − log S,    m = max z,    S = Σ exp(z − m)
    E    = (exp(z − m) − S · onehot(y)) · (1 − tanh²)        = (p − onehot) · S, times softcap's own derivative
    dx   = −g / S · logit_scale / temperature · E            for an upstream gradient g of logp

Logits, bias, E and dx are float32, bfloat16 or float16; all arithmetic and every statistic is float32, and E and dx
are rounded once, when they are stored. One program owns a row: results do not depend on N, no atomics, and E or dx may
overwrite the logits, since a program reads a block before it writes it and no other program touches its row.

Bytes moved per logit of b bytes: b for the log-probs alone, 2b + (bytes of E) with E, b + (bytes of dx) for the
gradient. Rows whose target is ignored read nothing. exp_rows.py writes E from one read, where it has its own memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .tiles import COMPILE_OPTIONS, backend_of, check_tensor, launch_guard, row_tile

STATS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The running maximum starts here and not at −inf, so that z − m is never −inf − (−inf) = NaN for a masked entry.
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


class TokenLogprobs(NamedTuple):
    """Per-row results of :func:`token_logprobs`; all (N,) float32 but ``stats["is_top1"]``, which is bool.

    Attributes:
        logps: log-probability of the target in nats; 0 where ignored.
        row_max: m, the row's largest z; 0 where ignored, NaN in a broken row or where the target is out of range.
        sum_exp: S = Σ exp(z − m); 1 where ignored.
        stats: the statistics that were asked for, by name.
    """

    logps: torch.Tensor
    row_max: torch.Tensor
    sum_exp: torch.Tensor
    stats: dict[str, torch.Tensor]


@triton.jit
def _tanh(u):
    """tanh(u) and its derivative 1 − tanh²(u), both to float32 accuracy at every u.

    With e = exp(−2|u|): tanh = ±(1 − 2e/(1 + e)) and 1 − tanh² = 4e/(1 + e)², which does not cancel where tanh is near
    1. Where tanh is near 0 its first form cancels: there a polynomial stands (minimax, relative error 1e-9).
    """
    e = tl.exp(-2.0 * tl.abs(u))
    r = 1.0 / (1.0 + e)
    far = 1.0 - 2.0 * e * r
    t = u * u
    series = 2.1071678e-2 + t * -6.2742396e-3
    series = -3.3333316e-1 + t * (1.3332586e-1 + t * (-5.3852309e-2 + t * series))
    near = u + u * (t * series)
    tanh = tl.where(tl.abs(u) < 0.55, near, tl.where(u < 0.0, -far, far))
    return tanh, 4.0 * e * r * r


@triton.jit
def _raw_logits(row_ptr, bias_ptr, offs_v, mask_v, stride_v, MASKED: tl.constexpr):
    """x + b in float32. A masked lane holds −inf + 0; only the tail tile is masked, for masks cost 16-byte loads."""
    if MASKED:
        x = tl.load(row_ptr + offs_v.to(tl.int64) * stride_v, mask=mask_v, other=-float("inf")).to(tl.float32)
        if bias_ptr is not None:
            x += tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
    else:
        x = tl.load(row_ptr + offs_v.to(tl.int64) * stride_v).to(tl.float32)
        if bias_ptr is not None:
            x += tl.load(bias_ptr + offs_v).to(tl.float32)
    return x


@triton.jit
def _scaled_logits(x, scale, cap):
    """z and the softcap's factor of dz/dx: z = x·scale where cap is None, else cap·tanh(x·scale)."""
    z = x * scale
    slope = 1.0
    if cap is not None:
        tanh, slope = _tanh(z)
        z = tanh * cap
    return z, slope


@triton.jit
def _clip(x):
    """x with ±inf made finite: the factor of a term whose other factor is 0 (0 · inf would be NaN)."""
    return tl.minimum(tl.maximum(x, LOWEST), -LOWEST)


@triton.jit
def _fill_row(out_ptr, value, stride_v, V, BLOCK_V: tl.constexpr):
    """One value in a whole row; 0 does not come from a product, since an ignored row may hold NaN."""
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        values = tl.full((BLOCK_V,), value, out_ptr.dtype.element_ty)
        tl.store(out_ptr + offs_v.to(tl.int64) * stride_v, values, mask=offs_v < V)


@triton.jit
def _store_ignored(
    row, logps_ptr, row_max_ptr, sum_exp_ptr, entropy_ptr, mean_logits_ptr, is_top1_ptr, log_sum_sq_probs_ptr
):
    """What an ignored row results in."""
    tl.store(logps_ptr + row, 0.0)
    tl.store(row_max_ptr + row, 0.0)
    tl.store(sum_exp_ptr + row, 1.0)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, 0.0)
    if mean_logits_ptr is not None:
        tl.store(mean_logits_ptr + row, 0.0)
    if is_top1_ptr is not None:
        tl.store(is_top1_ptr + row, False)
    if log_sum_sq_probs_ptr is not None:
        tl.store(log_sum_sq_probs_ptr + row, 0.0)


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
    """out = coefficient · (exp(z − m) − S·onehot) · (1 − tanh²), rounded once; out may be the row itself.

    The target is picked in the tile and not patched afterwards: a second store to the same address would race.
    """
    # 32-bit compares; a target that this wraps is out of range, and its row NaN by row_max.
    target = target.to(tl.int32)
    V_main = V // BLOCK_V * BLOCK_V
    for MASKED in tl.static_range(2):
        for start in range(MASKED * V_main, V if MASKED else V_main, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            mask_v = offs_v < V
            x = _raw_logits(row_ptr, bias_ptr, offs_v, mask_v, stride_v, MASKED)
            z, slope = _scaled_logits(x, scale, cap)
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
    exp_scale,
    BLOCK_V: tl.constexpr,
):
    # Each of the BLOCK_V lanes keeps its own running maximum and sums; they are merged once per row, so the loop has
    # no reduction across threads.
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits_n
    target = tl.load(targets_ptr + row).to(tl.int64)

    if target == ignore_index:
        _store_ignored(
            row, logps_ptr, row_max_ptr, sum_exp_ptr, entropy_ptr, mean_logits_ptr, is_top1_ptr, log_sum_sq_probs_ptr
        )
        if exp_ptr is not None:
            _fill_row(exp_ptr + row * stride_exp_n, 0.0, stride_exp_v, V, BLOCK_V)
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
            x = _raw_logits(row_ptr, bias_ptr, offs_v, mask_v, stride_logits_v, MASKED)
            z = _scaled_logits(x, scale, cap)[0]
            if MASKED:
                z = tl.where(mask_v, z, -float("inf"))
            # One exponential an entry: e rescales the old sums where z is a new maximum, and is z's own term elsewhere.
            delta = z - m
            e = tl.exp(-tl.abs(delta))
            rises = delta > 0.0
            if entropy_ptr is not None:
                # s_shift = Σ (z − m) exp(z − m); every past z − m shrinks by delta when the maximum rises.
                step = _clip(delta)
                s_shift = tl.where(rises, e * (s_shift - step * s), s_shift + step * e)
            if log_sum_sq_probs_ptr is not None:
                s_square = tl.where(rises, s_square * e * e + 1.0, s_square + e * e)
            if mean_logits_ptr is not None:
                s_logit += tl.where(mask_v, z, 0.0) if MASKED else z
            if is_top1_ptr is not None:
                first_max = tl.where(rises, offs_v, first_max)
            s = tl.where(rises, s * e + 1.0, s + e)
            m = tl.maximum(m, z)

    # Before the reductions' barriers: after them, another warp may already have written E over the logits.
    in_range = (target >= 0) & (target < V)
    x_target = tl.load(row_ptr + target * stride_logits_v, mask=in_range, other=float("nan")).to(tl.float32)
    if bias_ptr is not None:
        x_target += tl.load(bias_ptr + target, mask=in_range, other=0.0).to(tl.float32)
    z_target = _scaled_logits(x_target, scale, cap)[0]

    row_max = tl.max(m, 0)
    delta = m - row_max
    e = tl.exp(delta)
    sum_exp = tl.sum(s * e, 0)
    # Triton's maximum drops NaN, the sums do not; S is 0 where all entries are −inf, else at least 1.
    row_max = tl.where(in_range & (sum_exp > 0.0), row_max, float("nan"))
    log_sum = tl.log(sum_exp)
    tl.store(logps_ptr + row, z_target - row_max - log_sum)
    tl.store(row_max_ptr + row, row_max)
    tl.store(sum_exp_ptr + row, sum_exp)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, log_sum - tl.sum(e * (s_shift + _clip(delta) * s), 0) / sum_exp)
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
            exp_scale,
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
        _fill_row(out_ptr + row * stride_out_n, 0.0, stride_out_v, V, BLOCK_V)
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


def _check_rows(logits: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None) -> None:
    if logits.dim() != 2 or logits.shape[1] == 0 or logits.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"logits: expected (N, V) with V >= 1 in float32, bfloat16 or float16, got {tuple(logits.shape)} "
            f"{logits.dtype}; flatten leading dimensions, and use the reference for float64"
        )
    check_tensor("targets", targets, logits.shape[:1], (torch.int64,), logits.device)
    if bias is not None:
        check_tensor("bias", bias, logits.shape[1:], FLOAT_DTYPES, logits.device)


def _check_stats(stats: Sequence[str]) -> None:
    unknown = [name for name in stats if name not in STATS]
    if unknown:
        raise ValueError(f"stats: expected names among {', '.join(STATS)}, got {', '.join(map(repr, unknown))}")


def _empty_result(logits: torch.Tensor, stats: Sequence[str]) -> TokenLogprobs:
    def per_row(dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(logits.shape[0], dtype=dtype, device=logits.device)

    values = {name: per_row(torch.bool if name == "is_top1" else torch.float32) for name in stats}
    return TokenLogprobs(per_row(), per_row(), per_row(), values)


def _scales(logit_scale: float, softcap: float | None, temperature: float) -> tuple[float, float | None]:
    """(scale, cap) of _scaled_logits."""
    if not math.isfinite(logit_scale):
        raise ValueError(f"logit_scale: expected a finite number, got {logit_scale!r}")
    for name, value in (("temperature", temperature), ("softcap", 1.0 if softcap is None else softcap)):
        if not 0.0 < value < math.inf:
            raise ValueError(f"{name}: expected a finite number above 0, got {value!r}")
    if softcap is None:
        return logit_scale / temperature, None
    return logit_scale / softcap, softcap / temperature


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
    exp_scale: float = 1.0,
) -> TokenLogprobs:
    """Log-probability of each row's target, with statistics of the row and, on request, the row E of its gradient.

    A target outside [0, V) that is not ``ignore_index`` gives NaN in logps, row_max and its row of ``exp_out``; so does
    a row whose z hold NaN or +inf, or nothing above −inf. No other row is touched. A row with an ignored target is not
    read.

    Args:
        logits: x, (N, V) float32, bfloat16 or float16, any strides. 16-byte loads need a unit column stride and a row
            stride that is a multiple of 16.
        targets: y, (N,) int64.
        bias: b, (V,), added to every row.
        logit_scale, softcap, temperature: the maps from x to z (module docstring), finite, the latter two above 0.
        ignore_index: rows with this target get logp 0, statistics 0 and zeros in ``exp_out``.
        stats: any of "entropy" (of softmax(z), nats), "mean_logits" (mean of z over V), "is_top1" (the target attains
            the maximum of z; among equal maxima the first index does, as in argmax), "log_sum_sq_probs" (log Σ p²).
        exp_out: (N, V), any of the three dtypes and any strides, may be ``logits`` but must not overlap it otherwise:
            receives exp_scale · E. Neither logit_scale nor temperature is in E; multiply the row's coefficient by them.
        exp_scale: power of two that keeps E, whose target entry reaches V − 1, inside float16.

    Returns:
        :class:`TokenLogprobs`.

    Raises:
        ValueError: a shape, dtype, device, option or name of a statistic is not as above, or E might overflow.
    """
    _check_rows(logits, targets, bias)
    scale, cap = _scales(logit_scale, softcap, temperature)
    _check_stats(stats)
    N, V = logits.shape
    if exp_out is not None:
        check_tensor("exp_out", exp_out, logits.shape, FLOAT_DTYPES, logits.device)
        largest = torch.finfo(exp_out.dtype).max
        if not 0.0 < V * exp_scale <= largest:
            raise ValueError(
                f"exp_scale: expected a power of two in (0, {largest:g} / V], for E to fit {exp_out.dtype}, got "
                f"{exp_scale!r} at V = {V}; divide the row's coefficient by what you pass"
            )
    result = _empty_result(logits, stats)
    if N == 0:
        return result
    tile = row_tile(V, backend_of(logits))
    with launch_guard(_token_logprobs_kernel, logits, "logits"):
        _token_logprobs_kernel[(N,)](
            logits,
            bias.contiguous() if bias is not None else None,
            targets.contiguous(),
            result.logps,
            result.row_max,
            result.sum_exp,
            *(result.stats.get(name) for name in STATS),
            exp_out,
            *logits.stride(),
            *(exp_out.stride() if exp_out is not None else (0, 0)),
            V,
            ignore_index,
            scale,
            cap,
            float(exp_scale),
            BLOCK_V=tile.BLOCK_V,
            num_warps=tile.num_warps,
            **COMPILE_OPTIONS,
        )
    return result


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
    """out = g · (onehot − softmax(z)) · dz/dx, the gradient of :func:`token_logprobs` in its logits.

    Args:
        logits: x, (N, V) float32, bfloat16 or float16, any strides.
        targets: y, (N,) int64.
        row_max, sum_exp: (N,) float32, what :func:`token_logprobs` returned for these logits and options.
        grad_logps: g, (N,) float32, bfloat16 or float16.
        out: (N, V), any of the three dtypes and any strides; may be ``logits`` but must not overlap it otherwise.
            Exactly 0 in ignored rows (also where g or x is NaN), NaN where the target is out of range.
        bias, logit_scale, softcap, temperature, ignore_index: as in :func:`token_logprobs`.

    Returns:
        ``out``.

    Raises:
        ValueError: a shape, dtype, device or option is not as above.
    """
    _check_rows(logits, targets, bias)
    N, V = logits.shape
    check_tensor("row_max", row_max, (N,), (torch.float32,), logits.device)
    check_tensor("sum_exp", sum_exp, (N,), (torch.float32,), logits.device)
    check_tensor("grad_logps", grad_logps, (N,), FLOAT_DTYPES, logits.device)
    check_tensor("out", out, (N, V), FLOAT_DTYPES, logits.device)
    scale, cap = _scales(logit_scale, softcap, temperature)
    if N == 0:
        return out
    tile = row_tile(V, backend_of(logits))
    with launch_guard(_token_logprobs_grad_kernel, logits, "logits"):
        _token_logprobs_grad_kernel[(N,)](
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
            ignore_index,
            scale,
            cap,
            logit_scale / temperature,
            BLOCK_V=tile.BLOCK_V,
            num_warps=tile.num_warps,
            **COMPILE_OPTIONS,
        )
    return out
