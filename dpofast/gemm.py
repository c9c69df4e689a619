"""Matrix products whose result is float32 although their factors are 16-bit.

A bfloat16 logit costs 0.03 nats on a 256-token sum, so logits and weight gradients of a 16-bit model are float32.
CUDA's GEMMs write float32 directly (out_dtype). On the CPU the wide factor is upcast a block of rows at a time, so no
float32 copy of a (V, D) weight ever exists. float32 and float64 factors go straight to BLAS.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of the (V, D) factor that are upcast together on the CPU: 4 MiB at D = 1024.
_UPCAST_ROWS = 1024


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, sums and log-probs for inputs of `dtype`: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _blocks(rows: int) -> list[slice]:
    return [slice(start, min(start + _UPCAST_ROWS, rows)) for start in range(0, rows, _UPCAST_ROWS)]


def logits_into(out: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """out (R, V) = hidden (R, D) · weight (V, D)ᵀ, accumulated and written in out's float32 or float64."""
    if hidden.dtype == out.dtype:
        torch.mm(hidden, weight.t(), out=out)
    elif hidden.is_cuda:
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    else:
        wide = hidden.to(out.dtype)
        for block in _blocks(weight.shape[0]):
            torch.mm(wide, weight[block].to(out.dtype).t(), out=out[:, block])


def add_transposed_product(total: Tensor, rows: Tensor, scaled: Tensor, *, first: bool) -> None:
    """total (V, D) = rows (R, V)ᵀ · scaled (R, D), added to what is there unless first; total is float32 or float64."""
    if rows.dtype == total.dtype:
        torch.mm(rows.t(), scaled, out=total) if first else total.addmm_(rows.t(), scaled)
    elif rows.is_cuda:
        if first:
            torch.mm(rows.t(), scaled, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, rows.t(), scaled, out_dtype=total.dtype, out=total)
    else:
        wide = scaled.to(total.dtype)
        for block in _blocks(total.shape[0]):
            factor = rows[:, block].to(total.dtype).t()
            torch.mm(factor, wide, out=total[block]) if first else total[block].addmm_(factor, wide)


def product(rows: Tensor, weight: Tensor) -> Tensor:
    """rows (R, V) · weight (V, D) in rows' dtype, upcasting a block of the weight at a time where the dtypes differ."""
    if rows.dtype == weight.dtype:
        return torch.mm(rows, weight)
    total = rows.new_zeros(rows.shape[0], weight.shape[1])
    for block in _blocks(weight.shape[0]):
        total.addmm_(rows[:, block], weight[block].to(rows.dtype))
    return total
