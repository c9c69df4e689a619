"""Shared code of the row kernels: the map from logits to z for one tile, and the launchers' checks and launch.

Symbols are those of token_logprobs.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .tiles import COMPILE_OPTIONS, backend_of, check_tensor, launch_guard, row_tile

STATS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Initial value of the running maximum. With −inf, z − m would be −inf − (−inf) = NaN for a masked entry.
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


class TokenLogprobs(NamedTuple):
    """Per-row results of :func:`token_logprobs`; all (N,) float32 but ``stats["is_top1"]``, which is bool.

    Attributes:
        logps: log-probability of the target in nats; 0 where ignored.
        row_max: m, the row's largest z; 0 where ignored; NaN if the row's z contain NaN or +inf or are all −inf, or if
            the target is out of range.
        sum_exp: S = Σ exp(z − m); 1 where ignored.
        rescale: −(logit_scale / temperature) / S, which times g gives c of dx = c · E; 0 where ignored. Where E is
            float16, S and E are those that are scaled by a power of two.
        stats: the requested statistics by name.
    """

    logps: torch.Tensor
    row_max: torch.Tensor
    sum_exp: torch.Tensor
    rescale: torch.Tensor
    stats: dict[str, torch.Tensor]

    def part(self, rows: slice) -> TokenLogprobs:
        """The results of some of the rows, in the same memory."""
        stats = {name: values[rows] for name, values in self.stats.items()}
        return TokenLogprobs(self.logps[rows], self.row_max[rows], self.sum_exp[rows], self.rescale[rows], stats)


@triton.jit
def tanh(u):
    """Hyperbolic tangent of u and its derivative 1 − tanh²(u), both to float32 accuracy at every u.

    With e = exp(−2|u|): tanh = ±(1 − 2e/(1 + e)) and 1 − tanh² = 4e/(1 + e)². The latter has no cancellation where tanh
    is near 1. The former cancels where tanh is near 0, so below |u| = 0.55 a polynomial is used instead (minimax,
    relative error 1e-9).
    """
    e = tl.exp(-2.0 * tl.abs(u))
    r = 1.0 / (1.0 + e)
    far = 1.0 - 2.0 * e * r
    t = u * u
    series = 2.1071678e-2 + t * -6.2742396e-3
    series = -3.3333316e-1 + t * (1.3332586e-1 + t * (-5.3852309e-2 + t * series))
    near = u + u * (t * series)
    value = tl.where(tl.abs(u) < 0.55, near, tl.where(u < 0.0, -far, far))
    return value, 4.0 * e * r * r


@triton.jit
def raw_logits(row_ptr, bias_ptr, offs_v, mask_v, stride_v, MASKED: tl.constexpr):
    """Load x + b as float32; masked lanes are −inf.

    Only the tail tile is masked, because a mask prevents 16-byte loads.
    """
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
def scaled_logits(x, scale, cap):
    """Return z and softcap's factor of dz/dx: z = x·scale where cap is None, else cap·tanh(x·scale)."""
    z = x * scale
    slope = 1.0
    if cap is not None:
        value, slope = tanh(z)
        z = value * cap
    return z, slope


@triton.jit
def clip(x):
    """Replace ±inf in x by the largest finite values, for a product whose other factor may be 0 (0 · inf is NaN)."""
    return tl.minimum(tl.maximum(x, LOWEST), -LOWEST)


@triton.jit
def fill_row(out_ptr, value, stride_v, V, BLOCK_V: tl.constexpr):
    """Store one value in a whole row. Multiplying by 0 would not do for ignored rows, which may hold NaN."""
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        values = tl.full((BLOCK_V,), value, out_ptr.dtype.element_ty)
        tl.store(out_ptr + offs_v.to(tl.int64) * stride_v, values, mask=offs_v < V)


@triton.jit
def store_ignored(
    row,
    logps_ptr,
    row_max_ptr,
    sum_exp_ptr,
    rescale_ptr,
    entropy_ptr,
    mean_logits_ptr,
    is_top1_ptr,
    log_sum_sq_probs_ptr,
):
    """Store the results of an ignored row: sum_exp 1 and everything else 0."""
    tl.store(logps_ptr + row, 0.0)
    tl.store(row_max_ptr + row, 0.0)
    tl.store(sum_exp_ptr + row, 1.0)
    tl.store(rescale_ptr + row, 0.0)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, 0.0)
    if mean_logits_ptr is not None:
        tl.store(mean_logits_ptr + row, 0.0)
    if is_top1_ptr is not None:
        tl.store(is_top1_ptr + row, False)
    if log_sum_sq_probs_ptr is not None:
        tl.store(log_sum_sq_probs_ptr + row, 0.0)


def check_rows(logits: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raise ValueError unless logits (N, V), targets (N,) int64 and bias (V,) match in shape, dtype and device."""
    if logits.dim() != 2 or logits.shape[1] == 0 or logits.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"logits: expected (N, V) with V >= 1 in float32, bfloat16 or float16, got {tuple(logits.shape)} "
            f"{logits.dtype}; flatten leading dimensions, and use the reference for float64"
        )
    check_tensor("targets", targets, logits.shape[:1], (torch.int64,), logits.device)
    if bias is not None:
        check_tensor("bias", bias, logits.shape[1:], FLOAT_DTYPES, logits.device)


def check_stats(stats: Sequence[str]) -> None:
    """Raise ValueError for a name that is not in STATS."""
    unknown = [name for name in stats if name not in STATS]
    if unknown:
        raise ValueError(f"stats: expected names among {', '.join(STATS)}, got {', '.join(map(repr, unknown))}")


def empty_result(rows: int, stats: Sequence[str], like: torch.Tensor) -> TokenLogprobs:
    """Allocate uninitialized results for that many rows, on the device of `like`.

    Raises:
        ValueError: a name of a statistic is unknown.
    """
    check_stats(stats)

    def per_row(dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return like.new_empty(rows, dtype=dtype)

    values = {name: per_row(torch.bool if name == "is_top1" else torch.float32) for name in stats}
    return TokenLogprobs(per_row(), per_row(), per_row(), per_row(), values)


class LogitMap(NamedTuple):
    """The map from logits to z, as the arguments of scaled_logits."""

    scale: float
    cap: float | None


def scales(logit_scale: float, softcap: float | None, temperature: float) -> LogitMap:
    """Return the LogitMap of these options.

    Raises:
        ValueError: an option is not finite, or temperature or softcap is not above 0.
    """
    if not math.isfinite(logit_scale):
        raise ValueError(f"logit_scale: expected a finite number, got {logit_scale!r}")
    for name, value in (("temperature", temperature), ("softcap", 1.0 if softcap is None else softcap)):
        if not 0.0 < value < math.inf:
            raise ValueError(f"{name}: expected a finite number above 0, got {value!r}")
    if softcap is None:
        return LogitMap(logit_scale / temperature, None)
    return LogitMap(logit_scale / softcap, softcap / temperature)


class RowOptions(NamedTuple):
    """The last arguments of a row kernel: the target to ignore, the map from logits to z, and dz/dx without softcap."""

    ignore_index: int
    scale: float
    cap: float | None
    grad_scale: float


def row_options(logit_scale: float, softcap: float | None, temperature: float, ignore_index: int) -> RowOptions:
    """Return the RowOptions of these options.

    Raises:
        ValueError: an option is not finite, or temperature or softcap is not above 0.
    """
    return RowOptions(ignore_index, *scales(logit_scale, softcap, temperature), logit_scale / temperature)


def run_rows(kernel: Any, logits: torch.Tensor, *arguments: Any) -> None:
    """Launch a kernel whose first argument is logits (N, V), with one program per row and the tile size for V."""
    tile = row_tile(logits.shape[1], backend_of(logits))
    with launch_guard(kernel, logits, "logits"):
        kernel[(logits.shape[0],)](
            logits, *arguments, BLOCK_V=tile.BLOCK_V, num_warps=tile.num_warps, **COMPILE_OPTIONS
        )


def launch_rows(
    kernel: Any,
    logits: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    exp_out: torch.Tensor | None,
    stats: Sequence[str],
    options: RowOptions,
    out: TokenLogprobs | None,
) -> TokenLogprobs:
    """Launch the forward kernel of token_logprobs.py or exp_rows.py, one program per row.

    Args:
        kernel: the kernel to launch.
        logits, targets, bias: already checked by check_rows; N may be 0.
        exp_out: (N, V) for E, or None.
        stats: names of statistics, checked here.
        options: the result of row_options().
        out: results to write, contiguous, as empty_result allocates them for N rows and these statistics; or None.

    Returns:
        ``out``, or new :class:`TokenLogprobs`.

    Raises:
        ValueError: a name of a statistic is unknown, or ``out`` has other rows or statistics.
    """
    N, V = logits.shape
    result = empty_result(N, stats, logits) if out is None else out
    if set(result.stats) != set(stats) or any(len(vector) != N for vector in result[:-1]):
        raise ValueError(
            f"out: expected results of {N} rows with statistics {sorted(stats)}, "
            f"got {len(result.logps)} rows with {sorted(result.stats)}: allocate it by empty_result"
        )
    if N == 0:
        return result
    run_rows(
        kernel,
        logits,
        bias.contiguous() if bias is not None else None,
        targets.contiguous(),
        *result[:-1],
        *(result.stats.get(name) for name in STATS),
        exp_out,
        *logits.stride(),
        *(exp_out.stride() if exp_out is not None else (0, 0)),
        V,
        *options,
    )
    return result
