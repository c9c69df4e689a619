"""Packed attention in transformers' models: registered with AttentionInterface, by a backend chosen for each layer.

It is registered under a name that contains the model's former implementation. A call without a layout (plain logits,
generation) is passed to that implementation unchanged; a call with one goes to the first of three backends that can run
it (layout.py says what they compute). The layout comes as a keyword, and again on the mask, for layers that pass no
keywords on to their attention.

    varlen    FlashAttention over all runs of rows at once: 16-bit on NVIDIA GPUs, without softcap and sinks
    flex      FlexAttention on CUDA where varlen cannot
    sdpa      run by run: float32 without softcap and sinks on CUDA, and everything elsewhere
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dpofast.model.attention.flash import active_flash_attention
from dpofast.model.attention.flex import flex_attention_packed, flex_refusal
from dpofast.model.attention.indexer import run_indexers, selection_in_mask, skip_indexers
from dpofast.model.attention.layout import AttentionOptions, PackedLayout, layout_of, on_device
from dpofast.model.attention.methods import wrap_methods
from dpofast.model.attention.sdpa import sdpa_attention
from dpofast.model.attention.varlen import varlen_attention, varlen_refusal
from dpofast.model.parallel.exchange import own_heads, own_rows
from dpofast.packing.parallel.row_split import RowSplit

_PREFIX = "dpofast_"
_BACKENDS = {"varlen": varlen_attention, "flex": flex_attention_packed, "sdpa": sdpa_attention}
_SEGMENTWISE = ContextVar("_SEGMENTWISE", default=False)


class BackendChoice(NamedTuple):
    """A key of _BACKENDS, and in words why it was chosen."""

    backend: str
    reason: str


def choose_attention(query: Tensor, value: Tensor, options: AttentionOptions) -> BackendChoice:
    """The fastest backend that can attend from query (1, H, T, Dh) to values (1, H_kv, T, Dv), and why."""
    refusal = varlen_refusal(query, value, options)
    if refusal is None:
        return BackendChoice("varlen", f"{active_flash_attention()} over all segments at once")
    capped = options.softcap is not None or options.sinks is not None
    if query.dtype in (torch.float16, torch.bfloat16) or capped:
        flex = flex_refusal(query, value, options)
        if flex is None:
            return BackendChoice("flex", f"not varlen: {refusal}")
        refusal += f"; not flex: {flex}"
    return BackendChoice("sdpa", f"segment by segment; not varlen: {refusal}")


def attention_report(device: torch.device) -> dict[str, str]:
    """Which backend attends on a device and why, for a few kinds of layers; for `dpofast info`."""
    kinds = {
        "16-bit": (torch.bfloat16, AttentionOptions()),
        "16-bit, softcap or sinks": (torch.bfloat16, AttentionOptions(softcap=50.0)),
        "float32": (torch.float32, AttentionOptions()),
    }
    report = {}
    for kind, (dtype, options) in kinds.items():
        example = torch.empty(1, 1, 1, 64, dtype=dtype, device=device)
        report[kind] = "{}: {}".format(*choose_attention(example, example, options))
    return report


def use_packed_attention(backbone: Any) -> None:
    """Make a backbone's attention take packed layouts; calls without one run its own implementation as before.

    Again after set_attn_implementation, it stands before the new implementation. Else a second call changes nothing.
    """
    if not backbone._can_set_attn_implementation():
        wrap_methods(backbone, _counted)
        return
    former = backbone.config._attn_implementation
    if not former.startswith(_PREFIX):
        _register(former)
        backbone.set_attn_implementation(_PREFIX + former)
        skip_indexers(backbone)


def register_again(backbone: Any) -> None:
    """Register what the config of a pickled backbone names: another process may not have done so."""
    _register(backbone.config._attn_implementation.removeprefix(_PREFIX))


def restore_attention(backbone: Any) -> None:
    """Undo use_packed_attention."""
    run_indexers(backbone)
    backbone.set_attn_implementation(backbone.config._attn_implementation.removeprefix(_PREFIX))


def _register(former: str) -> None:
    if _PREFIX + former in ALL_ATTENTION_FUNCTIONS:
        return
    AttentionInterface.register(_PREFIX + former, _attention_over(former))
    if former in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(_PREFIX + former, ALL_MASK_ATTENTION_FUNCTIONS[former])


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
        packed_layout = packed_layout or layout_of(attention_mask)
        if packed_layout is None:
            plain = ALL_ATTENTION_FUNCTIONS.get(former, _eager_attention_of(module))
            attention_mask, options = selection_in_mask(attention_mask, options, key.shape[2], former)
            return plain(module, query, key, value, attention_mask, *args, **options)
        if options.get("position_bias") is not None:
            raise ValueError(f"{type(module).__name__}: packed attention has no position_bias, which this model needs")
        if attention_mask is not None and attention_mask.numel() > 1:
            packed_layout.foreign_masks.append(f"{type(module).__name__}'s of shape {tuple(attention_mask.shape)}")
        return _counted(
            _scaled_by_position(module, query, packed_layout),
            key,
            value,
            packed_layout,
            AttentionOptions(
                scaling=options.get("scaling"),
                window=options.get("sliding_window"),
                chunk=_chunk(module, packed_layout),
                softcap=options.get("softcap"),
                sinks=options.get("s_aux"),
                dropout=options.get("dropout", 0.0),
            ),
        ), None

    return attention


@torch.compiler.disable  # every batch has another layout, and a compiled layer would be traced again for each
def _counted(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, options: AttentionOptions) -> Tensor:
    layout.calls += 1
    if layout.split is None:
        return packed_attention(query, key, value, layout, options)
    return _split_attention(query, key, value, layout, layout.split, options)


def _split_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, split: RowSplit, options: AttentionOptions
) -> Tensor:
    """packed_attention of this rank's R rows, (1, R, H, Dv): it attends for its own heads, over all rows."""
    if options.dropout:
        raise ValueError("split_over: expected attention without dropout, which would be drawn by the heads of a rank")
    query, key, value = _in_autocast(query, key, value)  # 16-bit numbers travel in half the time
    if options.sinks is not None:
        options = replace(options, sinks=options.sinks.chunk(split.group.size())[split.group.rank()])
    query, key, value = own_heads(query, key, value, split)
    return own_rows(packed_attention(query, key, value, layout, options), split)


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, options: AttentionOptions
) -> Tensor:
    """Attention of query (1, H, T, Dh) over key (1, H_kv, T, Dh) and value (1, H_kv, T, Dv): (1, T, H, Dv).

    Under autocast it runs in autocast's dtype, as scaled_dot_product_attention would: rotary embeddings leave queries
    and keys in float32 there.
    """
    query, key, value = _in_autocast(query, key, value)
    backend = "sdpa" if _SEGMENTWISE.get() else choose_attention(query, value, options).backend
    return _BACKENDS[backend](query, key, value, layout, options)


def _in_autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    kind = query.device.type
    if torch.is_autocast_enabled(kind) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        return query.to(dtype), key.to(dtype), value.to(dtype)
    return query, key, value


@contextlib.contextmanager
def segmentwise() -> Iterator[None]:
    """Inside, every layer attends by sdpa: by torch's functions alone, which a TorchFunctionMode may change."""
    token = _SEGMENTWISE.set(True)
    try:
        yield
    finally:
        _SEGMENTWISE.reset(token)


def _chunk(module: Any, layout: PackedLayout) -> int | None:
    """The chunk size of a layer of chunked attention, where some sequence is longer."""
    kinds = getattr(getattr(module, "config", None), "layer_types", None)
    if not kinds or "chunked_attention" not in kinds or kinds[module.layer_idx] != "chunked_attention":
        return None
    size: int = module.config.attention_chunk_size
    return size if size < layout.once("longest", layout.segments.longest_path) else None


def _scaled_by_position(module: Any, query: Tensor, layout: PackedLayout) -> Tensor:
    """Queries that Llama 4's layers without rotary positions have scaled by their row: by their position instead."""
    tuned = getattr(module, "attn_temperature_tuning", False) and not module.use_rope
    if not tuned or layout.segments.num_rows < module.floor_scale:  # all scales are 1
        return query

    def correction() -> Tensor:
        positions = on_device(layout.segments.positions(), query.device)
        if layout.split is not None:
            positions = positions[layout.split.rows]
        places = torch.stack((positions, torch.arange(len(positions), device=query.device)))
        scales = torch.log1p(torch.floor((places.float() + 1.0) / module.floor_scale)) * module.attn_scale + 1.0
        return scales[0] / scales[1]

    factor = layout.once(("temperature", query.device), correction)
    return (query * factor[:, None]).to(query.dtype)  # 16-bit queries are rounded a second time


def _eager_attention_of(module: nn.Module) -> Callable[..., Any] | None:
    """The eager attention function in the model's own file, which is not in transformers' registry."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
