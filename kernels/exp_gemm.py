"""Log-probabilities from hidden states and the LM head, and the rows E of their gradient, from one GEMM.

For hidden states h (N, D), LM head W (V, D) and bias b (V,), and logit_scale, softcap and temperature as in
token_logprobs.py:

    x = h · Wᵀ + b,   z = softcap · tanh(logit_scale · x / softcap) / temperature

S and E may be computed with any shift c in place of the row's maximum, if both use the same one (exp_rows.py), so the
GEMM's epilogue can write E as soon as it has a tile of logits: neither logits nor a pass over them goes through memory.

    a = z · log2(e) − c,   e = 2^a,   S = Σ e,   E = (e − S · onehot(y)) · (1 − tanh²)
    logp = (a_y − log2 S) · ln 2,   lse = (c + log2 S) · ln 2,   rescale = −(logit_scale / temperature) / S

1. The guess: c is the larger of the target's z · log2(e) and the maximum over up to 512 columns of the head, evenly
   spaced: 0.4 % of the GEMM at V = 128,256.
2. The GEMM writes e and, per row and split of the vocabulary, its sum. An exponential is one fused multiply-add and one
   ex2. a is rounded once, near 0 where e matters, and an error of c cancels: logits near 1e4 lose nothing beyond their
   own rounding.
3. The patch, one program per row, adds up the splits and writes logp, lse, rescale and E's target entry (inside the
   tile it would take registers that the tile needs). A row whose log2 S is outside RANGES is flagged.
4. Four launches that end at once where no row is flagged: linear_lse.py computes log Σ exp z of the row tiles with a
   flagged row, which becomes the shift of the flagged rows, and 2 and 3 run again. The rows beside them are written
   again with the same bits. A row whose S is still not a finite number above 0 becomes NaN throughout.

Example: z · log2(e) = 1 3 | 9 5 with target 1 and sampled columns 0 and 1 gives c = 3 and e = 0.25 1 | 64 4.

E is rounded once, when it is stored, and S is the sum before that. A bfloat16 or float32 E has exponents for any S
between 2^-60 and 2^64. A float16 E has not: there c is 4 below the guess, and S at most 2^13. Equal inputs give
bit-identical results: there are no atomics, and the number of splits depends on the shapes and the device only. Bytes:
each row tile reads all of W from L2; row tiles that run at the same time share the reads of W from memory, and their
hidden states stay in L2. E is written once, and 4 · (splits + 5) bytes a row.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .exp_gemm_rows import exponents, guess_kernel, patch_kernel, reshift_kernel, row_shift
from .linear_lse import linear_lse_kernel
from .linear_parts import LinearLaunch, check_linear, described, split_columns, tile_logits
from .linear_tiles import LinearTile, guess_tile
from .row_parts import LogitMap, scales
from .tiles import COMPILE_OPTIONS, backend_of, check_tensor, launch_guard, row_tile

# Columns whose maximum is part of the guess.
SAMPLES = 512
LOG2_E = math.log2(math.e)
# A program that handles one row reads a handful of numbers.
ROW_WARPS = 1


class Range(NamedTuple):
    """log2 S of rows that are not computed again, for one dtype of E, and log2 S of those that are."""

    least: float
    most: float
    again: float


RANGES = {
    torch.float32: Range(-60.0, 64.0, 0.0),
    torch.bfloat16: Range(-60.0, 64.0, 0.0),
    torch.float16: Range(0.0, 13.0, 4.0),
}


class ExpGemm(NamedTuple):
    """Per-row results of :func:`exp_gemm`, (N,) float32, the first two in nats; all are 0 where ignored.

    Attributes:
        logps: log-probability of the target.
        lse: log Σ exp z, so that the target's z is logps + lse.
        rescale: −(logit_scale / temperature) / S, so that dlogp/dx = rescale · E.
    """

    logps: torch.Tensor
    lse: torch.Tensor
    rescale: torch.Tensor


@triton.jit
def _exp_tile(
    hidden,
    weight,
    bias_ptr,
    exp,
    shift,
    first_n,
    first_v,
    N,
    V,
    D,
    stride_hidden_n,
    stride_weight_v,
    stride_exp_n,
    scale,
    cap,
    MASKED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store columns [first_v, first_v + BLOCK_V) of E, where it is wanted, and return their sum of e."""
    x = tile_logits(
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
        MASKED,
        DESCRIPTORS,
        EVEN_D,
        BLOCK_N,
        BLOCK_V,
        BLOCK_D,
    )
    a, slope = exponents(x, shift[:, None], scale, cap)
    e = tl.exp2(a)
    offs_v = first_v + tl.arange(0, BLOCK_V)
    if MASKED:
        e = tl.where((offs_v < V)[None, :], e, 0.0)
    if exp is not None:
        if DESCRIPTORS:
            # What lies outside of E is not written.
            exp.store([first_n, first_v], (e * slope).to(exp.dtype))
        else:
            offs_n = first_n + tl.arange(0, BLOCK_N)
            pointers = exp + offs_n.to(tl.int64)[:, None] * stride_exp_n + offs_v[None, :]
            mask = (offs_n < N)[:, None]
            if MASKED:
                mask = mask & (offs_v < V)[None, :]
            tl.store(pointers, (e * slope).to(exp.dtype.element_ty), mask=mask)
    return tl.sum(e, 1)


# The first and the second run's flags differ in alignment: they are no reason to compile a kernel twice.
@triton.jit(do_not_specialize=["splits", "slots"], do_not_specialize_on_alignment=["flags_ptr"])
def _exp_gemm_kernel(
    hidden,
    weight,
    bias_ptr,
    exp,
    guess_ptr,
    flags_ptr,
    sum_exp_ptr,
    N,
    V,
    D,
    stride_hidden_n,
    stride_weight_v,
    splits,
    stride_exp_n,
    slots,
    scale,
    cap,
    DESCRIPTORS: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    # Programs start in order: the splits of one row tile, then the next row tile's (linear_tiles.vocab_splits).
    program = tl.program_id(0)
    split = program % splits
    first_n = program // splits * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    if tl.max(tl.load(flags_ptr + offs_n, mask=mask_n, other=0).to(tl.int32), 0) == 0:
        return
    shift = row_shift(guess_ptr, offs_n, mask_n, slots, BLOCK_G)
    begin, full, end = split_columns(split, splits, V, BLOCK_V)

    s = tl.zeros((BLOCK_N,), tl.float32)
    # With a flattened loop the loads of the next tile overlap the epilogue of this one. Without descriptors, flattening
    # would make Triton drop the software pipeline.
    for first_v in tl.range(begin, full, BLOCK_V, flatten=DESCRIPTORS):
        s += _exp_tile(
            hidden,
            weight,
            bias_ptr,
            exp,
            shift,
            first_n,
            first_v,
            N,
            V,
            D,
            stride_hidden_n,
            stride_weight_v,
            stride_exp_n,
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
        s += _exp_tile(
            hidden,
            weight,
            bias_ptr,
            exp,
            shift,
            first_n,
            full,
            N,
            V,
            D,
            stride_hidden_n,
            stride_weight_v,
            stride_exp_n,
            scale,
            cap,
            True,
            DESCRIPTORS,
            EVEN_D,
            BLOCK_N,
            BLOCK_V,
            BLOCK_D,
        )
    tl.store(sum_exp_ptr + offs_n.to(tl.int64) * splits + split, s, mask=mask_n)


def _launch(
    launch: LinearLaunch,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    exp_out: torch.Tensor | None,
    result: ExpGemm,
    logit_map: LogitMap,
    ignore_index: int,
    grad_scale: float,
) -> None:
    """Run all kernels: N >= 1, everything checked and contiguous."""
    hidden, weight = launch.hidden, launch.weight
    N, V, D, stride_hidden_n, stride_weight_v, splits = launch.sizes
    tile, small = launch.tile, guess_tile(hidden.dtype)
    scale, cap = logit_map
    # Of the exponents: z · log2(e).
    power = (scale * LOG2_E, None) if cap is None else (scale, cap * LOG2_E)
    safe = RANGES[torch.float32 if exp_out is None else exp_out.dtype]

    step = max(1, V // SAMPLES)
    sample = weight[::step][:SAMPLES]
    slots = triton.cdiv(len(sample), small.BLOCK_V) + 1
    new, float32 = hidden.new_empty, torch.float32
    guess, target_logit = new(N, slots, dtype=float32), new(N, dtype=float32)
    row_max, sum_exp = new(2, N, splits, dtype=float32)
    # Rows of the first run, rows to run again, and what those leave behind: a program reads one and writes the next.
    flags = new(3, N, dtype=torch.int8)
    block_g, block_s = triton.next_power_of_2(slots), triton.next_power_of_2(splits)

    exp = exp_out
    if exp_out is not None and launch.descriptors:
        exp = described(exp_out, tile.BLOCK_N, tile.BLOCK_V)
    stride_exp_n = 0 if exp_out is None else exp_out.stride(0)

    def run(number: int) -> None:
        _exp_gemm_kernel[launch.grid](
            *launch.operands,
            bias,
            exp,
            guess,
            flags[number],
            sum_exp,
            *launch.sizes,
            stride_exp_n,
            slots,
            *power,
            BLOCK_G=block_g,
            **launch.constants,
        )
        row = row_tile(V, backend_of(hidden))
        patch_kernel[(N,)](
            targets,
            target_logit,
            guess,
            sum_exp,
            flags[number],
            flags[number + 1],
            exp_out,
            *result,
            N,
            V,
            stride_exp_n,
            splits,
            slots,
            ignore_index,
            *power,
            grad_scale,
            safe.least,
            safe.most,
            BLOCK_N=tile.BLOCK_N,
            BLOCK_G=block_g,
            BLOCK_S=block_s,
            BLOCK_V=row.BLOCK_V,
            num_warps=ROW_WARPS,
            **COMPILE_OPTIONS,
        )

    with launch_guard(_exp_gemm_kernel, hidden, "hidden"):
        guess_kernel[(triton.cdiv(N, small.BLOCK_N) * slots,)](
            hidden,
            sample,
            None if bias is None else bias[::step][:SAMPLES].contiguous(),
            weight,
            bias,
            targets,
            guess,
            target_logit,
            flags[0],
            N,
            V,
            D,
            len(sample),
            stride_hidden_n,
            sample.stride(0),
            stride_weight_v,
            slots,
            ignore_index,
            *power,
            safe.again,
            EVEN_D=D % small.BLOCK_D == 0,
            BLOCK_N=small.BLOCK_N,
            BLOCK_V=small.BLOCK_V,
            BLOCK_D=small.BLOCK_D,
            num_warps=small.num_warps,
            num_stages=small.num_stages,
            **COMPILE_OPTIONS,
        )
        run(0)
        linear_lse_kernel[launch.grid](
            *launch.operands, bias, flags[1], row_max, sum_exp, *launch.sizes, scale, cap, **launch.constants
        )
        reshift_kernel[(N,)](
            flags[1],
            row_max,
            sum_exp,
            guess,
            splits,
            slots,
            safe.again,
            LOG2_E,
            BLOCK_S=block_s,
            BLOCK_G=block_g,
            num_warps=ROW_WARPS,
            **COMPILE_OPTIONS,
        )
        run(1)


def exp_gemm(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    exp_out: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    out: ExpGemm | None = None,
    splits: int | None = None,
    tile: LinearTile | None = None,
    descriptors: bool | None = None,
) -> ExpGemm:
    """Log-probability of each row's target from its hidden state and the LM head, and its E, without logits in memory.

    A target outside [0, V) that is not ``ignore_index`` gives NaN; so does a row whose z contain NaN or +inf, or are
    all −inf. Other rows are unaffected.

    Args:
        hidden: h, (N, D) float32, bfloat16 or float16. Any row stride; copied if the column stride is not 1.
        weight: W, (V, D), of hidden's dtype; strides as for hidden.
        targets: y, (N,) int64.
        exp_out: (N, V) float32, bfloat16 or float16, any row stride, column stride 1: receives E. None: E is not
            needed.
        bias: b, (V,) in any of the three dtypes.
        logit_scale, softcap, temperature: the maps from x to z (module docstring), finite, the latter two above 0.
        ignore_index: rows with this target get 0, in E too, even if their hidden states contain NaN.
        out: receives the results, each (N,) float32 and contiguous; None: new tensors.
        splits: programs that share the vocabulary of one row tile, at least 1; None chooses by shapes and device.
        tile: block sizes; None takes them from the table in linear_tiles.py.
        descriptors: load and store through tensor descriptors; None: if takes_descriptors says so and all rows, those
            of E too, start at multiples of 16 bytes.

    Returns:
        :class:`ExpGemm`.

    Raises:
        ValueError: a shape, dtype, stride, device or option is not as above, ``descriptors`` is True and rows do not
            start at multiples of 16 bytes, or the tensors are on the CPU and Triton is not in interpreter mode.
    """
    check_linear(hidden, weight, targets, bias)
    logit_map = scales(logit_scale, softcap, temperature)
    N, V = len(hidden), len(weight)
    if exp_out is not None:
        check_tensor("exp_out", exp_out, (N, V), tuple(RANGES), hidden.device)
        if exp_out.stride(1) != 1 and V > 1:
            raise ValueError(f"exp_out: expected rows with a column stride of 1, got strides {exp_out.stride()}")
    hidden, weight = (rows if rows.stride(1) == 1 else rows.contiguous() for rows in (hidden, weight))
    new = hidden.new_empty
    result = ExpGemm(*(new(N, dtype=torch.float32) for _ in range(3))) if out is None else out
    for name, values in zip(ExpGemm._fields, result, strict=True):
        check_tensor(f"out.{name}", values, (N,), (torch.float32,), hidden.device)
    if N == 0:
        return result
    launch = LinearLaunch.make(
        hidden, weight, exp_out, softcap=softcap is not None, splits=splits, tile=tile, descriptors=descriptors
    )
    _launch(
        launch,
        targets.contiguous(),
        None if bias is None else bias.contiguous(),
        exp_out,
        result,
        logit_map,
        ignore_index,
        logit_scale / temperature,
    )
    return result
