"""Work: what the positions of a row cost to compute, attention included, by which a step is divided among ranks.

A position costs one unit: its products with the weights of every layer. A query that sees a key costs
Σ layers 2·H·(Dk + Dv) operations more, of 2·weights for a position: of Llama 3.1 8B 1/26,600 of a unit, so that a row
of 1,024 positions attends for 2% of its work, one of 16,384 for a quarter, and one of 131,072 for 70%.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class AttentionWork:
    """What attention costs in units of a position.

    Attributes:
        kinds: (window, cost) of each kind of layer: positions that one sees, None for all before it, and the cost of
            a pair of a query and a key that it sees, in all layers of the kind.
    """

    kinds: tuple[tuple[int | None, float], ...] = ()

    @classmethod
    def of(cls, config: Any) -> AttentionWork:
        """Reads it from a model's config: exact for decoders of the Llama kind, an estimate for others.

        Args:
            config: of transformers; of a composite model, its language model's is read.
        """
        text = config.get_text_config()
        hidden, layers = _number(text, "hidden_size"), round(_number(text, "num_hidden_layers"))
        heads = _number(text, "num_attention_heads")
        if not (hidden and layers and heads):
            return cls()
        keys = _number(text, "num_key_value_heads") or heads
        value_dim = _number(text, "head_dim") or hidden / heads
        key_dim = value_dim
        if _number(text, "kv_lora_rank"):  # multi-head latent attention names its own
            key_dim = _number(text, "qk_nope_head_dim") + _number(text, "qk_rope_head_dim") or key_dim
            value_dim = _number(text, "v_head_dim") or value_dim
        chosen = _number(text, "num_experts_per_tok")
        width = _number(text, "intermediate_size") or 4 * hidden
        if chosen:
            width = chosen * (_number(text, "moe_intermediate_size") or width)
        weights = layers * hidden * ((heads + keys) * (key_dim + value_dim) + 3 * width)
        cost = heads * (key_dim + value_dim) / weights
        counts: dict[int | None, int] = {}
        for window in _windows(text, layers):
            counts[window] = counts.get(window, 0) + 1
        return cls(tuple((window, number * cost) for window, number in counts.items()))

    def of_lengths(self, lengths: np.ndarray) -> np.ndarray:
        """(n,) float64, attention of sequences of so many positions: each sees those before it and itself."""
        counts = lengths.astype(np.float64)
        total = np.zeros(len(counts))
        for window, cost in self.kinds:
            seen = counts if window is None else np.minimum(counts, window)
            total += cost * (seen * (seen + 1) / 2 + (counts - seen) * seen)
        return total


NO_ATTENTION = AttentionWork()


def _windows(text: Any, layers: int) -> Iterable[int | None]:
    """What each attending layer sees: so many positions, or None for all."""
    kinds = getattr(text, "layer_types", None)
    window = getattr(text, "sliding_window", None) or None
    if not kinds:
        kinds = ["sliding_attention" if window else "full_attention"] * layers
    for kind in kinds:
        if "sliding" in kind:
            yield window
        elif "chunked" in kind:
            yield getattr(text, "attention_chunk_size", None)
        elif kind != "linear_attention" and ("attention" in kind or kind == "hybrid"):
            yield None


def _number(config: Any, name: str) -> float:
    """An entry of a config, of one with a number a layer their mean; 0 where there is none."""
    value = getattr(config, name, None) or 0
    return float(np.mean(value)) if isinstance(value, (list, tuple)) else float(value)
