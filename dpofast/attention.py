"""The attention function that lets every branch of a packed row see its prompt and nothing else.

A packed row holds several groups: a prompt, then its branches. Query segment g attends to its prefix (the prompt's
rows) followed by its own rows, causally, aligned at the bottom right: with q queries and k keys, query i sees keys
j ≤ i + (k − q), and under a sliding window W also j > i + (k − q) − W. Key j of a segment has position j, so the window
counts positions.

It reaches transformers' models through AttentionInterface under a name that contains the model's former implementation.
A call without a layout (plain logits, generation) is handed to that former implementation unchanged.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dpofast.packing import Segments

_PREFIX = "dpofast_"
# Keyword arguments of some models' attention that change its result and that this function does not implement.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


class PackedLayout:
    """One packed forward's view of its segments: where K/V rows are cut, which pieces a segment sees, masks made once.

    calls counts the attention layers that saw the layout; model.py compares it with the number of layers, because a
    model whose attention drops keyword arguments would otherwise compute something else without an exception.
    """

    def __init__(self, segments: Segments) -> None:
        """Cut the rows at every segment bound and at the end of every prefix."""
        bounds = segments.cu_seqlens_q.tolist()
        prefixes = segments.prefixes.tolist()
        cuts = sorted({*bounds, *(row for prefix in prefixes for row in prefix)})
        self.query_sizes = [stop - start for start, stop in pairwise(bounds)]
        self.piece_sizes = [stop - start for start, stop in pairwise(cuts)]
        piece_at = {row: index for index, row in enumerate(cuts)}
        self.seen_pieces = [
            [*range(piece_at[prefix[0]], piece_at[prefix[1]]), *range(piece_at[start], piece_at[stop])]
            for prefix, (start, stop) in zip(prefixes, pairwise(bounds), strict=True)
        ]
        self.calls = 0
        self._masks: dict[tuple[Any, ...], Tensor] = {}

    def mask(self, query: Tensor, keys: int, window: int | None) -> Tensor | None:
        """(queries, keys) in query's dtype, −inf where a query sees no key; None where SDPA's causal mask is the same.

        Additive, because SDPA would turn a boolean mask into one at every call.
        """
        queries = query.shape[2]
        if queries == keys and (window is None or window >= keys):
            return None
        key = (queries, keys, window, query.dtype, query.device)
        if key not in self._masks:
            position = torch.arange(keys, device=query.device)
            distance = position[keys - queries :, None] - position
            hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
            zeros = torch.zeros(queries, keys, dtype=query.dtype, device=query.device)
            self._masks[key] = zeros.masked_fill(hidden, -torch.inf)
        return self._masks[key]


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    *,
    scaling: float | None = None,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of query (1, H, T, Dh) over key and value (1, H_kv, T, Dh), segment by segment: (1, T, H, Dh)."""
    keys, values = key.split(layout.piece_sizes, dim=2), value.split(layout.piece_sizes, dim=2)
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    for q, pieces in zip(query.split(layout.query_sizes, dim=2), layout.seen_pieces, strict=True):
        k = _joined([keys[piece] for piece in pieces])
        v = _joined([values[piece] for piece in pieces])
        mask = layout.mask(q, k.shape[2], window)
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
        outputs.append(attended.transpose(1, 2))
    return torch.cat(outputs, dim=1)


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def use_packed_attention(model: Any) -> None:
    """Let the model's attention understand layouts; its implementation for every other call stays what it was."""
    former = model.config._attn_implementation
    if former.startswith(_PREFIX):
        return
    AttentionInterface.register(_PREFIX + former, _attention_over(former))
    if former in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(_PREFIX + former, ALL_MASK_ATTENTION_FUNCTIONS[former])
    model.set_attn_implementation(_PREFIX + former)


def restore_attention(model: Any) -> None:
    """Undo use_packed_attention."""
    model.set_attn_implementation(model.config._attn_implementation.removeprefix(_PREFIX))


def _attention_over(former: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        packed_layout: PackedLayout | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if packed_layout is None:
            plain = ALL_ATTENTION_FUNCTIONS.get_interface(former, _eager_attention_of(module))
            return plain(module, query, key, value, attention_mask, *args, **options)
        unsupported = [name for name in _UNSUPPORTED if options.get(name) is not None]
        if unsupported:
            raise ValueError(
                f"{type(module).__name__}: packed attention has no {', '.join(unsupported)}, which this model's "
                "attention needs"
            )
        packed_layout.calls += 1
        attended = packed_attention(
            query,
            key,
            value,
            packed_layout,
            scaling=options.get("scaling"),
            window=options.get("sliding_window"),
            dropout=options.get("dropout", 0.0),
        )
        return attended, None

    return attention


def _eager_attention_of(module: nn.Module) -> Callable[..., Any] | None:
    """The eager function that the model's own file defines: transformers does not keep it in its registry."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
