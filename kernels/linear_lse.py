"""log Σ exp z of rows of hidden states by running maxima, for the rows whose shift exp_gemm.py guessed badly.

For hidden states h (N, D), LM head W (V, D) and bias b (V,), and logit_scale, softcap and temperature as in
token_logprobs.py:

    x = h · Wᵀ + b,   z = softcap · tanh(logit_scale · x / softcap) / temperature,   m = max z,   S = Σ exp(z − m)

A program handles BLOCK_N rows and one split of the vocabulary. It computes BLOCK_N × BLOCK_V logits by tl.dot in
float32 accumulators, accumulates them into the running (m, S) of each row, and advances to the next columns. With two
columns per tile, z = 1 3 | 2 5 gives (3, 1.14), then (5, 1.20). It writes (m, S): 8 bytes per row and split. A running
maximum takes about nine instructions a logit, a known shift three (on sm_90), so this is not how rows are done first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .linear_parts import split_columns, tile_logits
from .row_parts import LOWEST, scaled_logits


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
    z = scaled_logits(x, scale, cap)[0]
    if MASKED:
        offs_v = first_v + tl.arange(0, BLOCK_V)
        z = tl.where((offs_v < V)[None, :], z, -float("inf"))
    m_new = tl.maximum(m, tl.max(z, 1))
    s = s * tl.exp(m - m_new) + tl.sum(tl.exp(z - m_new[:, None]), 1)
    return m_new, s


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["flags_ptr"])
def linear_lse_kernel(
    hidden,
    weight,
    bias_ptr,
    flags_ptr,
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
    """Write (m, S) of each row and split, in row tiles that hold a flagged row."""
    # Programs start in order: the splits of one row tile, then the next row tile's (linear_tiles.vocab_splits).
    program = tl.program_id(0)
    split = program % splits
    first_n = program // splits * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    if tl.max(tl.load(flags_ptr + offs_n, mask=offs_n < N, other=0).to(tl.int32), 0) == 0:
        return
    begin, full, end = split_columns(split, splits, V, BLOCK_V)

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

    slots = offs_n.to(tl.int64) * splits + split
    tl.store(row_max_ptr + slots, m, mask=offs_n < N)
    tl.store(sum_exp_ptr + slots, s, mask=offs_n < N)
