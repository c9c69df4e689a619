"""Matrix products whose result is float32 although their factors are 16-bit.

A bfloat16 logit costs 0.03 nats on a 256-token sum, so logits and weight gradients of a 16-bit model are float32.
CUDA's GEMMs write float32 directly (out_dtype). On the CPU the wide factor is upcast upcast_rows rows of the (V, D)
side at a time, so no float32 copy of a whole weight ever exists. float32 and float64 factors go straight to BLAS.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpofast.head.planning.device import head_device
from dpofast.head.planning.dtypes import accumulate_dtype
from dpofast.head.planning.plan import chunks


def logits_into(out: Tensor, hidden: Tensor, weight: Tensor, upcast_rows: int) -> None:
    """out (R, V) = hidden (R, D) · weight (V, D)ᵀ, accumulated and written in out's float32 or float64."""
    if hidden.dtype == out.dtype:
        torch.mm(hidden, weight.t(), out=out)
    elif head_device(hidden.device).widens:
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    else:
        wide = hidden.to(out.dtype)
        for block in chunks(0, weight.shape[0], upcast_rows):
            torch.mm(wide, weight[block].to(out.dtype).t(), out=out[:, block])


def add_transposed_product(total: Tensor, rows: Tensor, scaled: Tensor, upcast_rows: int, *, first: bool) -> None:
    """total (V, D) = rows (R, V)ᵀ · scaled (R, D), accumulated unless first.

    total is float32 or float64; or, where nothing will be added to it, any narrower dtype, rounded once.
    """
    if rows.dtype == total.dtype:
        torch.mm(rows.t(), scaled, out=total) if first else total.addmm_(rows.t(), scaled)
    elif head_device(rows.device).widens and rows.dtype.itemsize < total.dtype.itemsize:
        if first:
            torch.mm(rows.t(), scaled, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, rows.t(), scaled, out_dtype=total.dtype, out=total)
    else:
        dtype = accumulate_dtype(rows.dtype)
        # A total that is narrower still takes the one product of factors that are wide already.
        parts = [slice(len(rows))] if rows.dtype == dtype else chunks(0, len(rows), upcast_rows) or [slice(0)]
        for part in parts:
            wide = scaled[part].to(dtype)
            for block in chunks(0, total.shape[0], upcast_rows):
                factor = rows[part, block].to(dtype).t()
                if not first:
                    total[block].addmm_(factor, wide)
                elif total.dtype == dtype:
                    torch.mm(factor, wide, out=total[block])
                else:
                    total[block] = torch.mm(factor, wide)
            first = False


def product_into(out: Tensor, rows: Tensor, weight: Tensor, upcast_rows: int) -> None:
    """out (R, D) = rows (R, V) · weight (V, D), in rows' dtype, or in a wider one where the device's products widen.

    Where the weight is narrower than rows, a block of it at a time is upcast.
    """
    if rows.dtype == weight.dtype == out.dtype:
        torch.mm(rows, weight, out=out)
    elif rows.dtype == weight.dtype:
        torch.mm(rows, weight, out_dtype=out.dtype, out=out)
    else:
        out.zero_()
        for block in chunks(0, weight.shape[0], upcast_rows):
            out.addmm_(rows[:, block], weight[block].to(rows.dtype))
