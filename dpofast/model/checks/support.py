"""Rules on which models can run packed or padded with the log-prob head.

Many models run under a packed layout without an exception but give wrong log-probs: their attention ignores the layout
(Bloom, MPT, Falcon), or a recurrent state crosses segments (Mamba; recurrent/ prevents it where it can). Rules on the
model's class and config refuse the known ones; the parity check (parity.py) refuses the others.
"""

from __future__ import annotations

from typing import Any

from dpofast.model.attention.methods import has_attention_method
from dpofast.model.lm_head import plain_heads, refused_head
from dpofast.model.parts import backbone_of

# Types of layers that run packed, and the entry of the config by which those of one family are computed.
_LAYER_TYPES = {
    "full_attention": None,
    "sliding_attention": None,
    "chunked_attention": "attention_chunk_size",
    "indexed_attention": "index_topk",
    "deepseek_sparse_attention": "index_topk",  # its name in transformers 5.17
}
_WITHOUT_ATTENTION = {"mlp", "moe"}
# Layers that carry a state from token to token: without attention, and beside one.
_STATE = {"linear_attention", "mamba", "conv"}
_STATE_AND_ATTENTION = {"hybrid", "hybrid_sliding"}
# Attention calls of a layer: DiffLlama's two attend to one half of the values each.
_CALLS = {"diffllama": 2}


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
    kinds, config = _layer_types(model), model.config.get_text_config()
    known = {kind for kind, entry in _LAYER_TYPES.items() if entry is None or hasattr(config, entry)}
    foreign = set(kinds) - known - _WITHOUT_ATTENTION - _STATE - _STATE_AND_ATTENTION
    if foreign:
        theirs, ours = (", ".join(sorted(names)) for names in (foreign, known))
        raise cannot_pack(model, f"it has {theirs} layers, and only layers of {ours} can")
    if config.model_type == "blt":
        raise cannot_pack(model, "it cuts the whole of its row into patches of bytes")
    backbone = backbone_of(model)
    # unlike _supports_attention_backend, which StableLM lacks, this is read off the code
    reaches_attention = backbone._can_set_attn_implementation() or has_attention_method(backbone)
    if not reaches_attention and not is_recurrent(model):
        raise cannot_pack(model, "its attention does not go through transformers' AttentionInterface")


def is_recurrent(model: Any) -> bool:
    """Whether some layer carries a state from token to token: not all models of a hybrid class have one."""
    kinds = _layer_types(model)
    if not kinds:
        return bool(getattr(model, "_is_stateful", False))
    return not (_STATE | _STATE_AND_ATTENTION).isdisjoint(kinds)


def attention_calls(model: Any) -> int:
    """How many times the layers that a model's config names call attention in one forward."""
    config = model.config.get_text_config()
    layers = getattr(config, "decoder_layers", config.num_hidden_layers)  # of Whisper the latter are its encoder's
    attending = layers - sum(kind in _WITHOUT_ATTENTION | _STATE for kind in _layer_types(model))
    return attending * _CALLS.get(config.model_type, 1)


def _layer_types(model: Any) -> list[str]:
    return getattr(model.config.get_text_config(), "layer_types", None) or []


class CannotPack(ValueError):
    """A model that cannot run packed, with the reason; it may still run over padded rows."""


def cannot_pack(model: Any, reason: object) -> CannotPack:
    """The exception for a model that cannot run packed: its name and the reason."""
    return CannotPack(f"{type(model).__name__} cannot run packed: {reason}")
