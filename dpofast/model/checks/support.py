"""Rules on which models can run packed or padded with the log-prob head.

Many models run under a packed layout without an exception but give wrong log-probs: their attention ignores the layout
(Bloom, MPT, GPT-J), or a recurrent state crosses segments (Mamba; recurrent/ prevents it where it can). Rules on the
model's class and config refuse the known ones; the parity check (parity.py) refuses the others.
"""

from __future__ import annotations

from typing import Any

from dpofast.model.lm_head import plain_heads, refused_head
from dpofast.model.parts import backbone_of

_LAYER_TYPES = {"full_attention", "sliding_attention"}
# Layers that carry a state, alone or beside an attention, and layers of neither kind.
_RECURRENT_TYPES = {"linear_attention", "mamba", "conv", "hybrid", "hybrid_sliding"}
_OTHER_TYPES = {"moe", "mlp"}


def check_lm_head(model: Any) -> None:
    """Refuse a model whose logits are not one plain linear map of its backbone's output.

    Raises:
        ValueError: no decoder of text, or a head that is no nn.Linear.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_output_embeddings"):
        raise ValueError(f"{name}: expected a transformers causal language model (AutoModelForCausalLM)")
    encodes = any(getattr(part, "is_encoder_decoder", False) for part in (config, config.get_text_config()))
    if not encodes and model.get_output_embeddings() is None:
        raise ValueError(
            f"{name}: expected a model with its language-modelling head, and this one has none: pass the whole model "
            "(AutoModelForCausalLM), of which this may be the backbone"
        )
    if encodes or not hasattr(model, "generate"):
        raise ValueError(
            f"{name}: expected a decoder-only causal language model (AutoModelForCausalLM), not an encoder"
        )
    if "lsh" in getattr(config, "attn_layers", ()):  # Reformer
        raise ValueError(
            f"{name}: expected a forward that is the same at every call, and its attention hashes at random"
        )
    backbone_of(model)
    head = model.get_output_embeddings()
    if plain_heads(head) is None:
        raise refused_head(model)


def check_packed(model: Any) -> None:
    """Refuse a model whose layers do not all attend through transformers' AttentionInterface.

    Of one with recurrent layers the calls of attention tell: its class seldom says whether it does.

    Raises:
        CannotPack: with the reason.
    """
    foreign = _layer_types(model) - _LAYER_TYPES
    if is_recurrent(model):
        foreign -= _RECURRENT_TYPES | _OTHER_TYPES
    if foreign:
        known = " and ".join(sorted(_LAYER_TYPES))
        raise cannot_pack(model, f"it has {', '.join(sorted(foreign))} layers, and only {known} layers can")
    if not is_recurrent(model) and not getattr(backbone_of(model), "_supports_attention_backend", False):
        raise cannot_pack(model, "its attention does not go through transformers' AttentionInterface")


def is_recurrent(model: Any) -> bool:
    """Whether some layer carries a state from token to token, by the model's class and its config's layer_types."""
    return bool(getattr(model, "_is_stateful", False) or _layer_types(model) & _RECURRENT_TYPES)


def _layer_types(model: Any) -> set[str]:
    return set(getattr(model.config.get_text_config(), "layer_types", None) or _LAYER_TYPES)


class CannotPack(ValueError):
    """A model that cannot run packed, with the reason; it may still run over padded rows."""


def cannot_pack(model: Any, reason: object) -> CannotPack:
    """The exception for a model that cannot run packed: its name and the reason."""
    return CannotPack(f"{type(model).__name__} cannot run packed: {reason}")
