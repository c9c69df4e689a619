"""Packed attention run by run of rows (packing/segments.py): every device, dtype and option.

It calls PyTorch's scaled_dot_product_attention, or for layers with softcap or sinks, which that has not, a softmax
written out here. The latter materializes scores, and the former needs a mask of their size where a run continues
another one or under a sliding window. Where they are large, attention runs over chunks of queries that bound their
size, and the backward computes each chunk again.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dpofast.model.attention.chunks import runs_of
from dpofast.model.attention.layout import AttentionOptions, PackedLayout
from dpofast.packing.segments import Segments

# Largest block of float32 scores (all heads) that the written-out softmax materializes at once, and largest mask.
_SCORE_BYTES = 32 << 20


class _Pieces:
    """K/V rows cut where a run begins and where a path leaves it, and the pieces that each run sees.

    Attributes:
        query_sizes: rows of each run.
        sizes: rows of each piece.
        seen: the indices of the pieces that each run sees, in order of position.
    """

    def __init__(self, segments: Segments, chunk: int | None) -> None:
        runs = runs_of(segments, chunk)
        cuts = runs.ranges.unique().tolist()
        self.query_sizes = runs.cu_seqlens_q.diff().tolist()
        self.sizes = [stop - start for start, stop in pairwise(cuts)]
        at = {row: index for index, row in enumerate(cuts)}
        self.seen = [
            [piece for start, stop in ranges.tolist() for piece in range(at[start], at[stop])]
            for ranges in runs.ranges.split(runs.range_counts.tolist())
        ]


def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, options: AttentionOptions
) -> Tensor:
    """Attention of query (1, H, T, Dh) over key (1, H_kv, T, Dh) and value (1, H_kv, T, Dv): (1, T, H, Dv)."""
    pieces = layout.once(("pieces", options.chunk), lambda: _Pieces(layout.segments, options.chunk))
    keys, values = key.split(pieces.sizes, dim=2), value.split(pieces.sizes, dim=2)
    attend = _attend_sdpa if options.softcap is None and options.sinks is None else _attend_softmax
    outputs = []
    for q, seen in zip(query.split(pieces.query_sizes, dim=2), pieces.seen, strict=True):
        k, v = _joined([keys[piece] for piece in seen]), _joined([values[piece] for piece in seen])
        outputs.append(attend(q, k, v, layout, options).transpose(1, 2))
    return torch.cat(outputs, dim=1)


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def _attend_sdpa(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, options: AttentionOptions) -> Tensor:
    queries, keys = q.shape[2], k.shape[2]
    if queries == keys and (options.window is None or options.window >= keys):
        return _sdpa(q, k, v, None, options)
    rows = _SCORE_BYTES // (q.element_size() * keys)
    if rows < queries:
        return _in_chunks(_sdpa_of_chunk, rows, q, k, v, options)
    key = ("mask", queries, keys, options.window, q.dtype, q.device)
    return _sdpa(q, k, v, layout.once(key, lambda: _mask(q, keys, options.window)), options)


def _sdpa_of_chunk(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
    return _sdpa(q, k, v, _mask(q, k.shape[2], options.window), options)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: AttentionOptions) -> Tensor:
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=options.dropout,
        is_causal=mask is None,
        scale=options.scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _mask(query: Tensor, keys: int, window: int | None) -> Tensor:
    """(queries, keys) in query's dtype, −inf where a query sees no key.

    Additive, because SDPA would convert a boolean mask into an additive one at every call.
    """
    queries = query.shape[2]
    zeros = torch.zeros(queries, keys, dtype=query.dtype, device=query.device)
    return zeros.masked_fill(~_visible(queries, keys, window, query.device), -torch.inf)


def _visible(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """(queries, keys) bool: which keys each query sees, causally, aligned at the bottom right."""
    position = torch.arange(keys, device=device)
    distance = position[keys - queries :, None] - position
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def _attend_softmax(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, options: AttentionOptions) -> Tensor:
    rows = _SCORE_BYTES // (4 * q.shape[1] * k.shape[2])
    if rows >= q.shape[2]:
        return _softmax_attention(q, k, v, options)
    return _in_chunks(_softmax_attention, rows, q, k, v, options)


def _in_chunks(
    attend: Callable[..., Tensor], rows: int, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions
) -> Tensor:
    """attend over chunks of so many queries (at least one), each with the keys from its first to its last visible."""
    rows, queries, keys = max(rows, 1), q.shape[2], k.shape[2]
    chunks = []
    for start in range(0, queries, rows):
        part = q[:, :, start : start + rows]
        stop = keys - queries + start + part.shape[2]
        first = 0 if options.window is None else max(0, stop - part.shape[2] - options.window + 1)
        inputs = part, k[:, :, first:stop], v[:, :, first:stop], options
        if torch.is_grad_enabled():
            chunks.append(checkpoint(attend, *inputs, use_reentrant=False))
        else:
            chunks.append(attend(*inputs))
    return torch.cat(chunks, dim=2)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
    batch, heads, queries, width = q.shape
    kv_heads, keys = k.shape[1:3]
    scaling = width**-0.5 if options.scaling is None else options.scaling
    # The query heads of one K/V head are rows of one matmul, so that K and V are not repeated.
    grouped = q.reshape(batch, kv_heads, -1, width)
    scores = (grouped @ k.transpose(2, 3)).view(batch, heads, queries, keys) * scaling
    if scores.dtype != torch.float64:
        scores = scores.float()
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.masked_fill(~_visible(queries, keys, options.window, q.device), -torch.inf)
    if options.sinks is None:
        weights = scores.softmax(dim=-1)
    else:
        sink = options.sinks.to(scores.dtype).view(1, heads, 1, 1).expand(batch, heads, queries, 1)
        weights = torch.cat((scores, sink), dim=-1).softmax(dim=-1)[..., :-1]
    weights = F.dropout(weights, options.dropout).to(v.dtype).reshape(batch, kv_heads, -1, keys)
    return (weights @ v).view(batch, heads, queries, -1)
