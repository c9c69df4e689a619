"""The arguments of every attention backend: the layout of one packed forward, and the options of one attention layer.

A packed row is a trie of sequences, depth first (packing/segments.py). Each run of its rows attends to the rows of its
path, the last of which are its own, causally, aligned at the bottom right: with q queries and k keys, query i sees keys
j ≤ i + (k − q), and under a sliding window W also j > i + (k − q) − W. Key j of a run has position j, so the window
counts positions.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpofast.packing.parallel.row_split import RowSplit
from dpofast.packing.segments import Segments

_LAYOUT = "dpofast_layout"  # an attribute of the mask


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """How one layer turns scores s = q·k into weights: softmax over the visible keys of c·tanh(scaling·s/c).

    Attributes:
        scaling: factor of the scores; None means head_dim ** −0.5.
        window: sliding window: a query sees the keys at most window − 1 positions before it; None means all.
        chunk: a query sees the keys whose position divided by chunk is, rounded down, the same; None means all.
        softcap: c above, or None for no cap.
        sinks: (H,) attention-sink logits, one a query head: a key without a value in the softmax; or None.
        dropout: the probability that a weight is dropped.
    """

    scaling: float | None = None
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0


class PackedLayout:
    """The segments of one packed forward, and what the backends derive from them, computed once for all layers.

    Attributes:
        segments: of the packed row.
        split: which rows this process computes, where several share the packed row; else None.
        calls: of attention that have read the layout. packed_backbone compares them with those that the config implies:
            a model some of whose attention ignores the layout would otherwise compute something else without an
            exception.
        foreign_masks: masks of a layer's own, in words, which the layout would take the place of; refused like calls.
    """

    def __init__(self, segments: Segments, split: RowSplit | None = None) -> None:
        """Compute nothing yet."""
        self.segments, self.split = segments, split
        self.calls = 0
        self.foreign_masks: list[str] = []
        self._derived: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The result of make(), which is called at the first request under this key only."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]


def packed_mask(layout: PackedLayout, device: torch.device) -> Tensor:
    """The attention mask of a packed call, (1, 1, 1, 1) bool, with the layout as an attribute.

    transformers passes a four-dimensional mask through; without one it would build a (T, T) mask. It reaches the
    attention of every layer, and again where gradient checkpointing computes the layer a second time: on any thread,
    and with other packed calls in between.
    """
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    setattr(mask, _LAYOUT, layout)
    return mask


def layout_of(mask: Tensor | None) -> PackedLayout | None:
    """The layout that packed_mask put on the mask; None for any other mask."""
    return getattr(mask, _LAYOUT, None)


def on_device(index: Tensor, device: torch.device) -> Tensor:
    """An index of the CPU on a device; CUDA copies it from page-locked memory, for which the host does not wait."""
    staged = index.pin_memory() if device.type == "cuda" else index
    return staged.to(device, non_blocking=True)
