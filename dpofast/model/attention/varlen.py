"""Packed attention by torch.nn.attention.varlen: FlashAttention over all segments at once, 16-bit on CUDA.

A segment's queries are consecutive rows. Its keys, the prompt's rows and its own, are gathered by index: a prompt's K/V
rows are copied for each branch that reads them.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from dpofast.model.attention.layout import AttentionOptions, PackedLayout
from dpofast.packing.batch import Segments

_MAX_HEAD_DIM = 256
_PARAMETERS = inspect.signature(varlen_attn).parameters
# torch releases without this argument need K and V repeated for the query heads.
_HAS_GQA = "enable_gqa" in _PARAMETERS


def varlen_refusal(query: Tensor, value: Tensor, options: AttentionOptions) -> str | None:
    """Why varlen cannot run this layer, or None where it can."""
    reasons = {
        "it needs an NVIDIA GPU": query.device.type != "cuda" or torch.version.hip is not None,
        "it needs 16-bit numbers": query.dtype not in (torch.float16, torch.bfloat16),
        "this torch's varlen_attn has no scale and window_size": not {"scale", "window_size"} <= _PARAMETERS.keys(),
        "it has no softcap": options.softcap is not None,
        # Sinks could be computed from its log-sum-exp, but that has no gradient.
        "it has no sinks": options.sinks is not None,
        "it has no dropout": options.dropout > 0,
        "it needs values as wide as queries": query.shape[-1] != value.shape[-1],
        f"it needs a head_dim that is a multiple of 8, at most {_MAX_HEAD_DIM}": query.shape[-1] % 8 != 0
        or query.shape[-1] > _MAX_HEAD_DIM,
    }
    reason = next((reason for reason, applies in reasons.items() if applies), None)
    if reason is None and torch.cuda.get_device_capability(query.device) < (8, 0):
        return "it needs compute capability 8.0"
    return reason


class _Sequences:
    """The segments in the form of varlen_attn's arguments.

    Attributes:
        max_q, max_k: queries and keys of the longest segment.
        cu_seqlens_q, cu_seqlens_k: (G + 1,) int32 on the device.
        key_rows: the K/V row of every key, or None where keys are the rows themselves (no shared prompt).
    """

    def __init__(self, segments: Segments, device: torch.device) -> None:
        cu_seqlens_k = segments.cu_seqlens_k()
        self.max_q = int(segments.cu_seqlens_q.diff().max())
        self.max_k = int(cu_seqlens_k.diff().max())
        self.cu_seqlens_q = segments.cu_seqlens_q.to(device, non_blocking=True)
        self.cu_seqlens_k = cu_seqlens_k.to(device, non_blocking=True)
        shared = bool((segments.prefixes[:, 1] > segments.prefixes[:, 0]).any())
        self.key_rows = segments.key_rows().to(device, non_blocking=True) if shared else None


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, options: AttentionOptions
) -> Tensor:
    """Attention of query (1, H, T, Dh) over key and value (1, H_kv, T, Dh), 16-bit on CUDA: (1, T, H, Dh)."""
    sequences: _Sequences = layout.once(("sequences", query.device), lambda: _Sequences(layout.segments, query.device))
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if sequences.key_rows is not None:
        k, v = k.index_select(0, sequences.key_rows), v.index_select(0, sequences.key_rows)
    extra: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        if _HAS_GQA:
            extra["enable_gqa"] = True
        else:
            repeats = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    attended: Any = varlen_attn(
        q,
        k,
        v,
        sequences.cu_seqlens_q,
        sequences.cu_seqlens_k,
        sequences.max_q,
        sequences.max_k,
        scale=options.scaling,
        window_size=(_keys_to_the_left(options.window, sequences.max_k), 0),
        **extra,
    )
    return attended[None]


def _keys_to_the_left(window: int | None, max_k: int) -> int:
    """varlen_attn's left window size: a window of W is the query's own key and W − 1 before it; −1 means all."""
    return -1 if window is None or window >= max_k else window - 1
