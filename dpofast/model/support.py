"""Rules on which models can run packed or padded with the log-prob head.

Many models run under a packed layout without an exception but give wrong log-probs: their attention ignores the layout
(Bloom, MPT, GPT-J), or that of some layers does (hybrids), or a recurrent state crosses segments (Mamba). Rules on the
model's class and config refuse the known ones; the parity check (parity.py) refuses the others.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from dpofast.model.lm_head import refused_head

_LAYER_TYPES = {"full_attention", "sliding_attention"}


def check_lm_head(model: Any) -> None:
    """Refuse a model whose logits are not one plain linear map of its backbone's output.

    Raises:
        ValueError: no decoder of text, or a head that is no nn.Linear.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_output_embeddings"):
        raise ValueError(f"{name}: expected a transformers causal language model")
    if getattr(config, "is_encoder_decoder", False) or not hasattr(model, "generate"):
        raise ValueError(
            f"{name}: expected a decoder-only causal language model (AutoModelForCausalLM), not an encoder"
        )
    if "lsh" in getattr(config, "attn_layers", ()):  # Reformer
        raise ValueError(
            f"{name}: expected a forward that is the same at every call, and its attention hashes at random"
        )
    if config.get_text_config() is not config:
        raise ValueError(f"{name}: expected a text-only model; load its language model alone")
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise refused_head(model)
    if "forward" in vars(head):  # bound to nn.Linear's forward, so that LogprobLinear's would never run
        raise ValueError(
            f"{name}: expected a head whose forward is its class's, got one with a forward set on the module, as "
            "accelerate's hooks for several devices do: load the model on one device"
        )


def check_packed(model: Any) -> None:
    """Refuse a model whose layers do not all attend through transformers' AttentionInterface.

    Raises:
        CannotPack: with the reason.
    """
    if getattr(model, "_is_stateful", False):
        raise cannot_pack(model, "it carries a state from token to token, across the branches of a packed row")
    foreign = set(getattr(model.config, "layer_types", None) or _LAYER_TYPES) - _LAYER_TYPES
    if foreign:
        known = " and ".join(sorted(_LAYER_TYPES))
        raise cannot_pack(model, f"it has {', '.join(sorted(foreign))} layers, and only {known} layers can")
    if not getattr(model, "_supports_attention_backend", False):
        raise cannot_pack(model, "its attention does not go through transformers' AttentionInterface")


class CannotPack(ValueError):
    """A model that cannot run packed, with the reason; it may still run over padded rows."""


def cannot_pack(model: Any, reason: object) -> CannotPack:
    """The exception for a model that cannot run packed: its name and the reason."""
    return CannotPack(f"{type(model).__name__} cannot run packed: {reason}")
