"""Multiply a matrix by a number of each row, or a tensor by one number, where the numbers are on the device.

    scale_rows    out_r = c_r · x_r, and 0 where c_r = 0, whatever x_r holds: an ignored row's hidden may be NaN
    scale         x ← s · x in place, and nothing where s = 1: the gradient that reaches a loss is 1 unless it is scaled

Products are float32, rounded once. Bytes moved: scale_rows reads x and writes out; scale reads and writes x, or where
s = 1 reads s alone, a few bytes in place of the 2.1 GB of a 16-bit head of V = 128,256 and D = 4,096.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .row_parts import FLOAT_DTYPES, fill_row
from .tiles import COMPILE_OPTIONS, backend_of, check_tensor, launch_guard, row_tile

# Elements of a block of `scale`, for whose size row_tile has a tile.
_BLOCK = row_tile(1 << 17).BLOCK_V
# Programs of `scale`, each of which takes every PROGRAMS-th block: enough to fill a GPU, and few to start for nothing.
PROGRAMS = 2048


@triton.jit
def _scale_rows_kernel(
    out_ptr,
    rows_ptr,
    coefficients_ptr,
    stride_out_n,
    stride_out_d,
    stride_rows_n,
    stride_rows_d,
    D,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    out_row_ptr = out_ptr + row * stride_out_n
    row_ptr = rows_ptr + row * stride_rows_n
    coefficient = tl.load(coefficients_ptr + row)
    if coefficient == 0.0:
        fill_row(out_row_ptr, 0.0, stride_out_d, D, BLOCK_D)
        return
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        offs_d = offs_d.to(tl.int64)
        x = tl.load(row_ptr + offs_d * stride_rows_d, mask=mask_d, other=0.0).to(tl.float32)
        tl.store(out_row_ptr + offs_d * stride_out_d, (coefficient * x).to(out_ptr.dtype.element_ty), mask=mask_d)


@triton.jit
def _scale_kernel(values_ptr, factor_ptr, numel, BLOCK_D: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor == 1.0:
        return
    first = tl.program_id(0).to(tl.int64) * BLOCK_D
    step = tl.num_programs(0).to(tl.int64) * BLOCK_D
    for start in range(first, numel, step):
        offs = start + tl.arange(0, BLOCK_D).to(tl.int64)
        mask = offs < numel
        x = tl.load(values_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(values_ptr + offs, (factor * x).to(values_ptr.dtype.element_ty), mask=mask)


def scale_rows(out: torch.Tensor, rows: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """Write coefficients ⊙ rows to out, and zeros where a coefficient is 0.

    Args:
        out: (R, D) float32, bfloat16 or float16, any strides; may be ``rows`` but must not overlap it otherwise.
        rows: (R, D), any of the three dtypes, any strides; any values where the coefficient is 0.
        coefficients: (R,) float32.

    Returns:
        ``out``.

    Raises:
        ValueError: a shape, dtype or device is not as above.
    """
    if rows.dim() != 2:
        raise ValueError(f"rows: expected (R, D), got {tuple(rows.shape)}")
    check_tensor("rows", rows, rows.shape, FLOAT_DTYPES, rows.device)
    check_tensor("out", out, rows.shape, FLOAT_DTYPES, rows.device)
    check_tensor("coefficients", coefficients, rows.shape[:1], (torch.float32,), rows.device)
    if rows.numel():
        tile = row_tile(rows.shape[1], backend_of(rows))
        with launch_guard(_scale_rows_kernel, rows, "rows"):
            _scale_rows_kernel[(rows.shape[0],)](
                out,
                rows,
                coefficients.contiguous(),
                *out.stride(),
                *rows.stride(),
                rows.shape[1],
                BLOCK_D=tile.BLOCK_V,
                num_warps=tile.num_warps,
                **COMPILE_OPTIONS,
            )
    return out


def scale(values: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiply values by factor in place, without waiting for its value, and without touching them where it is 1.

    Args:
        values: float32, bfloat16 or float16, contiguous, or a contiguous matrix's transpose.
        factor: a float32 scalar on values' device.

    Returns:
        ``values``.

    Raises:
        ValueError: a shape, dtype, device or stride is not as above.
    """
    check_tensor("values", values, values.shape, FLOAT_DTYPES, values.device)
    check_tensor("factor", factor, (), (torch.float32,), values.device)
    flat = values.t() if values.dim() == 2 and not values.is_contiguous() else values
    if not flat.is_contiguous():
        raise ValueError(f"values: expected a contiguous tensor or its transpose, got strides {values.stride()}")
    blocks = triton.cdiv(values.numel(), _BLOCK)
    if blocks:
        warps = row_tile(1 << 17, backend_of(values)).num_warps
        with launch_guard(_scale_kernel, values, "values"):
            _scale_kernel[(min(blocks, PROGRAMS),)](
                flat, factor, values.numel(), BLOCK_D=_BLOCK, num_warps=warps, **COMPILE_OPTIONS
            )
    return values
