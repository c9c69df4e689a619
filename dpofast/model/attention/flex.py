"""Packed attention by FlexAttention: softcap, sinks and any head size on CUDA, without gathering K/V rows.

The rule of visibility (same segment and not later, or a row of the segment's prefix) becomes a mask function. The
kernel visits only the 128×128 blocks with a visible pair, which are computed here from the segments on the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from dpofast.model.attention.layout import AttentionOptions, PackedLayout, on_device
from dpofast.packing.batch import Segments

_BLOCK = 128
# Compiled variants of one model: windows × softcaps × with and without gradient × fixed and changing lengths.
_VARIANTS = 64
# torch's flex kernels multiply tiles of at least 16 columns.
_MIN_HEAD_DIM = 16


def flex_refusal(query: Tensor, value: Tensor, options: AttentionOptions) -> str | None:
    """Why FlexAttention cannot run this layer, or None where it can."""
    reasons = {
        "it trains on a GPU only": query.device.type != "cuda",
        "it has no float64": query.dtype == torch.float64,
        "it has no dropout": options.dropout > 0,
        f"it needs a head_dim of at least {_MIN_HEAD_DIM}": min(query.shape[-1], value.shape[-1]) < _MIN_HEAD_DIM,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def flex_attention_packed(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, options: AttentionOptions
) -> Tensor:
    """Attention of query (1, H, T, Dh) over key (1, H_kv, T, Dh) and value (1, H_kv, T, Dv): (1, T, H, Dv)."""
    device, window = query.device, options.window
    mask = layout.once(("blocks", device, window), lambda: block_mask(layout.segments, window, device))
    # Uncompiled it builds all T × T scores: for tests on the CPU, where torch has no backward for it either.
    run: Any = _compiled() if device.type == "cuda" else flex_attention
    result = run(
        query,
        key,
        value,
        score_mod=None if options.softcap is None else _softcapped(options.softcap),
        block_mask=mask,
        scale=options.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=None if options.sinks is None else AuxRequest(lse=True),
    )
    if options.sinks is None:
        return result.transpose(1, 2)
    attended, aux = result
    # Σ exp(s) / (Σ exp(s) + exp(sink)), in float32 as the log-sum-exp is
    weight = torch.sigmoid(aux.lse - options.sinks.float()[:, None])
    attended = (attended * weight[..., None]).to(value.dtype)
    return attended.transpose(1, 2)


@functools.cache
def _compiled() -> Callable[..., Any]:
    # fullgraph: past the recompilation limit torch would otherwise run it uncompiled, in T × T memory, without a word
    compiled: Any = torch.compile(flex_attention, fullgraph=True)

    def run(*inputs: Tensor, **options: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=_VARIANTS):
            return compiled(*inputs, **options)

    return run


@functools.cache
def _softcapped(softcap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


def block_mask(segments: Segments, window: int | None, device: torch.device) -> BlockMask:
    """FlexAttention's BlockMask of the segments over one packed row of T positions."""
    rows = int(segments.cu_seqlens_q[-1])
    some, full = _blocks(segments, window)
    sizes = segments.cu_seqlens_q.diff()
    bounds = torch.stack((segments.cu_seqlens_q[:-1], *segments.prefixes.unbind(1))).repeat_interleave(sizes, dim=1)
    start, low, high = (on_device(bound, device) for bound in bounds)
    (partial_counts, partial_columns), (full_counts, full_columns) = (
        (on_device(part, device) for part in _by_row(blocks)) for blocks in (some & ~full, full)
    )
    return BlockMask.from_kv_blocks(
        partial_counts,
        partial_columns,
        full_counts,
        full_columns,
        BLOCK_SIZE=_BLOCK,
        mask_mod=_visible(start, low, high, window),
        seq_lengths=(rows, rows),
    )


def _visible(start: Tensor, low: Tensor, high: Tensor, window: int | None) -> Callable[..., Tensor]:
    """The rule of visibility, from the first row and the prefix of each row's segment, (T,) int32 each."""

    def mask_mod(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        own = (key >= start[row]) & (key <= row)
        prefix = (key >= low[row]) & (key < high[row])
        if window is None:
            return own | prefix
        # Rows of a segment are as far apart as their positions; its first row follows the prefix's last position.
        return (own & (row - key < window)) | (prefix & (row - start[row] + high[row] - key < window))

    return mask_mod


def _blocks(segments: Segments, window: int | None) -> tuple[Tensor, Tensor]:
    """Two (blocks, blocks) bool: some query of the block sees some key of it; every query sees every key."""
    bounds, (low, high) = segments.cu_seqlens_q.long(), segments.prefixes.long().unbind(1)
    start, stop, rows = bounds[:-1], bounds[1:], int(bounds[-1])
    # One item a segment and block of queries in which it has rows
    touched = (stop - 1) // _BLOCK - start // _BLOCK + 1
    segment = torch.arange(len(start)).repeat_interleave(touched)
    block = (start // _BLOCK - touched.cumsum(0) + touched)[segment] + torch.arange(len(segment))
    start, stop, low, high = (part[segment] for part in (start, stop, low, high))
    first, last = start.maximum(block * _BLOCK), stop.minimum((block + 1) * _BLOCK) - 1
    edges = torch.arange(-(-rows // _BLOCK)) * _BLOCK
    reach = rows if window is None else window

    def overlap(begin: Tensor, end: Tensor) -> Tensor:
        """How many of the keys in [begin, end) lie in each block: (items, blocks)."""
        return (end[:, None].minimum(edges + _BLOCK) - begin[:, None].maximum(edges)).clamp(min=0)

    def seen(earliest: Tensor, latest: Tensor) -> Tensor:
        """The keys of each block from the window of row `earliest` up to row `latest`: (items, blocks)."""
        own = overlap(start.maximum(earliest - reach + 1), latest + 1)
        return own + overlap(low.maximum(high + earliest - start - reach + 1), high)

    some, lacking = torch.zeros(2, len(edges), len(edges), dtype=torch.int64)
    some.index_add_(0, block, (seen(first, last) > 0).long())
    lacking.index_add_(0, block, (seen(last, first) < _BLOCK).long())
    full = lacking == 0
    full[rows // _BLOCK :] = False  # a last block with fewer rows
    return some > 0, full


def _by_row(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of every row of blocks the number marked, (1, 1, R) int32, and all columns, marked first, (1, 1, R, C) int32."""
    columns = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(dim=1).int()[None, None], columns.int()[None, None]
