"""Packed attention by torch.nn.attention.varlen: FlashAttention over all runs of rows at once, 16-bit on CUDA.

A run's queries are consecutive rows. Its keys, the rows of its path, are gathered (gather.py): the K/V rows of a shared
beginning are copied for each run that follows it.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from dpofast.model.attention.chunks import runs_of
from dpofast.model.attention.flash import active_flash_attention, max_head_dim
from dpofast.model.attention.gather import KeyRows, gather_rows
from dpofast.model.attention.layout import AttentionOptions, PackedLayout, on_device
from dpofast.packing.segments import Segments

_PARAMETERS = inspect.signature(varlen_attn).parameters
# FlashAttention takes fewer K/V heads than query heads as they are. torch 2.11 passes them on and has no argument for
# it; later releases compare the numbers first, and ask for this argument.
_ASKS_FOR_GROUPS = "enable_gqa" in _PARAMETERS


def varlen_refusal(query: Tensor, value: Tensor, options: AttentionOptions) -> str | None:
    """Why varlen cannot run this layer, or None where it can."""
    width, widest = query.shape[-1], max_head_dim()
    reasons = {
        "it needs an NVIDIA GPU": query.device.type != "cuda" or torch.version.hip is not None,
        "it needs 16-bit numbers": query.dtype not in (torch.float16, torch.bfloat16),
        "this torch's varlen_attn has no scale and window_size": not {"scale", "window_size"} <= _PARAMETERS.keys(),
        "it has no softcap": options.softcap is not None,
        # Sinks could be computed from its log-sum-exp, but that has no gradient.
        "it has no sinks": options.sinks is not None,
        "it has no dropout": options.dropout > 0,
        "it needs values as wide as queries": width != value.shape[-1],
        f"it needs a head_dim that is a multiple of 8, at most {widest}": width % 8 != 0 or width > widest,
    }
    reason = next((reason for reason, applies in reasons.items() if applies), None)
    return reason or _device_refusal(query.device, width)


def _device_refusal(device: torch.device, width: int) -> str | None:
    if active_flash_attention() == "FA2" and not torch.backends.cuda.is_flash_attention_available():
        return "this torch was built without FlashAttention"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return "it needs compute capability 8.0"
    # torch's FlashAttention 2 has no backward for these elsewhere.
    if 192 < width <= 224 and capability not in ((8, 0), (9, 0)):
        return "it needs compute capability 8.0 or 9.0 for a head_dim above 192 and up to 224"
    return None


class _Sequences:
    """The runs in the form of varlen_attn's arguments.

    Attributes:
        max_q, max_k: queries and keys of the longest run.
        cu_seqlens_q, cu_seqlens_k: (R + 1,) int32 on the device.
        key_rows: the K/V row of every key, or None where keys are the rows themselves (nothing shared).
    """

    def __init__(self, segments: Segments, chunk: int | None, device: torch.device) -> None:
        runs = runs_of(segments, chunk)
        self.max_q = int(runs.cu_seqlens_q.diff().max())
        self.max_k = int(runs.cu_seqlens_k.diff().max())
        self.cu_seqlens_q = on_device(runs.cu_seqlens_q, device)
        self.cu_seqlens_k = on_device(runs.cu_seqlens_k, device)
        shared = len(runs.ranges) > len(runs.range_counts)
        key_rows = KeyRows.of(segments, chunk) if shared else None
        self.key_rows = key_rows and KeyRows(*(on_device(part, device) for part in key_rows))


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, options: AttentionOptions
) -> Tensor:
    """Attention of query (1, H, T, Dh) over key and value (1, H_kv, T, Dh), 16-bit on CUDA: (1, T, H, Dh)."""
    segments, chunk, device = layout.segments, options.chunk, query.device
    sequences: _Sequences = layout.once(("sequences", chunk, device), lambda: _Sequences(segments, chunk, device))
    # not tensor[0], whose gradient is copied into zeros
    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    if sequences.key_rows is not None:
        k, v = gather_rows(k, v, sequences.key_rows)
    grouped: dict[str, Any] = {"enable_gqa": True} if _ASKS_FOR_GROUPS and q.shape[1] != k.shape[1] else {}
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
        **grouped,
    )
    return attended.unsqueeze(0)


def _keys_to_the_left(window: int | None, max_k: int) -> int:
    """varlen_attn's left window size: a window of W is the query's own key and W − 1 before it; −1 means all."""
    return -1 if window is None or window >= max_k else window - 1
