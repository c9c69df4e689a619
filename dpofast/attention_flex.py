"""Packed attention by FlexAttention: softcap, sinks and any head size on CUDA, and no K/V row is gathered.

The row's own rules (same segment and not later, or a row of the segment's prefix) become a mask function, and the
128×128 blocks that hold any visible pair, counted here from the segments on the CPU, are all that the kernel visits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from dpofast.attention_layout import AttentionOptions, PackedLayout
from dpofast.packing import Segments

_BLOCK = 128
# torch's flex kernels multiply tiles of at least so many columns.
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
    # Uncompiled it builds all T × T scores: good for tests on the CPU, where torch can also not compile its backward.
    run = _compiled() if device.type == "cuda" else flex_attention
    attended, aux = run(
        query,
        key,
        value,
        score_mod=None if options.softcap is None else _softcapped(options.softcap),
        block_mask=mask,
        scale=options.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    if options.sinks is not None:
        # Σ exp(s) / (Σ exp(s) + exp(sink)), in float32 as the log-sum-exp is
        kept = torch.sigmoid(aux.lse - options.sinks.float()[:, None])
        attended = (attended * kept[..., None]).to(value.dtype)
    return attended.transpose(1, 2)


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, object]]:
    return torch.compile(flex_attention)


def _softcapped(softcap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


def block_mask(segments: Segments, window: int | None, device: torch.device) -> BlockMask:
    """The segments as FlexAttention's BlockMask over one packed row of T positions."""
    rows = int(segments.cu_seqlens_q[-1])
    some, full = _blocks(segments, window)
    per_row = [_by_row(part, device) for part in (some & ~full, full)]
    (partial_counts, partial), (full_counts, whole) = per_row
    return BlockMask.from_kv_blocks(
        partial_counts,
        partial,
        full_counts,
        whole,
        BLOCK_SIZE=_BLOCK,
        mask_mod=_visible(segments, window, device),
        seq_lengths=(rows, rows),
    )


def _visible(segments: Segments, window: int | None, device: torch.device) -> Callable[..., Tensor]:
    sizes = segments.cu_seqlens_q.diff()
    bounds = torch.stack((segments.cu_seqlens_q[:-1], *segments.prefixes.unbind(1)))
    start, low, high = bounds.repeat_interleave(sizes, dim=1).to(device, non_blocking=True)

    def mask_mod(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        own = (key >= start[row]) & (key <= row)
        prefix = (key >= low[row]) & (key < high[row])
        if window is None:
            return own | prefix
        # Between two rows of a segment lie as many positions as rows; from its start on, the prefix's end comes before.
        return (own & (row - key < window)) | (prefix & (row - start[row] + high[row] - key < window))

    return mask_mod


def _blocks(segments: Segments, window: int | None) -> tuple[Tensor, Tensor]:
    """(blocks, blocks) bool each: some query of the block sees some key of it; every query sees every key."""
    bounds = segments.cu_seqlens_q.tolist()
    count = -(-bounds[-1] // _BLOCK)
    some, full = torch.zeros(2, count, count, dtype=torch.bool).unbind()
    reach = window or bounds[-1] + 1
    for (start, stop), (low, high) in zip(pairwise(bounds), segments.prefixes.tolist(), strict=True):
        for block in range(start // _BLOCK, -(-stop // _BLOCK)):
            first, last = max(start, block * _BLOCK), min(stop, (block + 1) * _BLOCK) - 1
            # The keys that the first and the last of these queries begin to see under the window
            own_from, own_all_from = max(start, first - reach + 1), max(start, last - reach + 1)
            seen_from, seen_all_from = (max(low, high + row - start - reach + 1) for row in (first, last))
            for begin, end in ((own_from, last + 1), (seen_from, high)):
                if begin < end:
                    some[block, begin // _BLOCK : -(-end // _BLOCK)] = True
            if last - first + 1 == _BLOCK:
                for begin, end in ((own_all_from, first + 1), (seen_all_from, high)):
                    full[block, -(-begin // _BLOCK) : end // _BLOCK] = True
    return some, full


def _by_row(blocks: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """The number of marked blocks of every row, (1, 1, R) int32, and their columns first, (1, 1, R, C) int32."""
    columns = blocks.int().argsort(dim=1, descending=True, stable=True)
    counts = blocks.sum(dim=1)
    return tuple(part.int().to(device, non_blocking=True)[None, None] for part in (counts, columns))  # type: ignore[return-value]
