"""Packed attention by FlexAttention: softcap, sinks and any head size on CUDA, without gathering K/V rows.

The rule of visibility (a row sees the rows of its path that are not later) becomes a mask function: rows lie depth
first, so row k is on the path of a later row q as long as q comes before the end of all that follows k's segment. The
kernel visits only the 128×128 blocks with a visible pair, which are computed here from the segments on the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from dpofast.model.attention.chunks import runs_of
from dpofast.model.attention.layout import AttentionOptions, PackedLayout, on_device
from dpofast.packing.segments import Segments

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
    device, window, chunk = query.device, options.window, options.chunk
    mask = layout.once(("blocks", device, window, chunk), lambda: block_mask(layout.segments, window, device, chunk))
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


def block_mask(segments: Segments, window: int | None, device: torch.device, chunk: int | None = None) -> BlockMask:
    """FlexAttention's BlockMask of the segments over one packed row of T positions."""
    rows = segments.num_rows
    some, full = _blocks(segments, window, chunk)
    ends, positions = (on_device(part.int(), device) for part in (segments.by_row(segments.ends), segments.positions()))
    (partial_counts, partial_columns), (full_counts, full_columns) = (
        (on_device(part, device) for part in _by_row(blocks)) for blocks in (some & ~full, full)
    )
    return BlockMask.from_kv_blocks(
        partial_counts,
        partial_columns,
        full_counts,
        full_columns,
        BLOCK_SIZE=_BLOCK,
        mask_mod=_visible(ends, positions, window, chunk),
        seq_lengths=(rows, rows),
    )


def _visible(ends: Tensor, positions: Tensor, window: int | None, chunk: int | None) -> Callable[..., Tensor]:
    """The rule of visibility, from the end of what follows each row's segment and its position, (T,) int32 each."""

    def mask_mod(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        seen = (key <= row) & (row < ends[key])
        if chunk is not None:
            seen = seen & (positions[row] // chunk == positions[key] // chunk)
        return seen if window is None else seen & (positions[row] - positions[key] < window)

    return mask_mod


def _blocks(segments: Segments, window: int | None, chunk: int | None) -> tuple[Tensor, Tensor]:
    """Two (blocks, blocks) bool: some query of the block sees some key of it; every query sees every key."""
    runs, rows, positions = runs_of(segments, chunk), segments.num_rows, segments.positions()
    start, stop = runs.cu_seqlens_q[:-1].long(), runs.cu_seqlens_q[1:].long()
    # One item a run and block of queries in which it has rows
    touched = (stop - 1) // _BLOCK - start // _BLOCK + 1
    run = torch.arange(len(start)).repeat_interleave(touched)
    block = (start // _BLOCK - touched.cumsum(0) + touched)[run] + torch.arange(len(run))
    first, last = start[run].maximum(block * _BLOCK), stop[run].minimum((block + 1) * _BLOCK) - 1
    # and one part for each range of its keys
    counts = runs.range_counts[run]
    item = torch.arange(len(run)).repeat_interleave(counts)
    range_index = (runs.range_counts.cumsum(0)[run] - counts.cumsum(0))[item] + torch.arange(len(item))
    low, high = runs.ranges[range_index].unbind(1)
    shift = low - positions[low]
    # int32 and in place: (parts, blocks) tables of many megabytes cost their page faults
    edges = torch.arange(-(-rows // _BLOCK), dtype=torch.int32) * _BLOCK
    reach = rows if window is None else window

    def seen(earliest: Tensor, latest: Tensor) -> Tensor:
        """The keys of each block from the window of row `earliest` up to row `latest`: (items, blocks)."""
        begin = low.maximum(shift + (positions[earliest] - reach + 1)[item])
        end = high.minimum(latest[item] + 1)
        parts = end.int()[:, None].minimum(edges + _BLOCK).sub_(begin.int()[:, None].maximum(edges)).clamp_(min=0)
        return torch.zeros(len(run), len(edges), dtype=torch.int32).index_add_(0, item, parts)

    some, lacking = torch.zeros(2, len(edges), len(edges), dtype=torch.int32)
    some.index_add_(0, block, (seen(first, last) > 0).int())
    lacking.index_add_(0, block, (seen(last, first) < _BLOCK).int())
    full = lacking == 0
    full[rows // _BLOCK :] = False  # a last block with fewer rows
    return some > 0, full


def _by_row(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of every row of blocks the number marked, (1, 1, R) int32, and all columns, marked first, (1, 1, R, C) int32."""
    columns = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(dim=1).int()[None, None], columns.int()[None, None]
