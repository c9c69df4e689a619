"""What every attention backend is given: one packed forward's layout, and the options of one attention layer.

A packed row holds several groups: a prompt, then its branches. Query segment g attends to its prefix (the prompt's
rows) followed by its own rows, causally, aligned at the bottom right: with q queries and k keys, query i sees keys
j ≤ i + (k − q), and under a sliding window W also j > i + (k − q) − W. Key j of a segment has position j, so the window
counts positions.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dpofast.packing.pack import Segments


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """How one layer turns scores s = q·k into weights: softmax over the visible keys of c·tanh(scaling·s/c).

    Args:
        scaling: factor of the scores; None means head_dim ** −0.5.
        window: a query sees the keys at most window − 1 positions before it; None means all.
        softcap: c above, or None for no cap.
        sinks: (H,) logits, one a query head, of a key without a value that only takes weight away; or None.
        dropout: the probability that a weight is dropped.
    """

    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0


class PackedLayout:
    """One packed forward's segments, and what the backends make of them: once for all layers.

    calls counts the attention layers that saw the layout; trunk.py compares it with the number of layers, because a
    model whose attention drops keyword arguments would otherwise compute something else without an exception.
    """

    def __init__(self, segments: Segments) -> None:
        """Keep the segments; nothing is computed yet."""
        self.segments = segments
        self.calls = 0
        self._made: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The result of make(), which is called for the first request under this key only."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]
