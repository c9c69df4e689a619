"""Quantized base weights: which models can train, and how FSDP2 can shard them.

Gradients must run through frozen quantized layers to an adapter, which bitsandbytes' do and transformers' layers for
MXFP4 and NVFP4 do not. A reference needs no gradient: the parity check alone decides about it.
"""

from __future__ import annotations

from typing import Any

import torch

from dpofast.model.parts import base_causal_lm

_WAYS = {
    "mxfp4": "load it with quantization_config=Mxfp4Config(dequantize=True), in 16 bits",
    "nvfp4": "load its 16-bit checkpoint without a quantization_config",
}
_OTHER = "load a 16-bit checkpoint of it"


def check_quantized(model: Any) -> None:
    """Refuse to train a model whose quantized layers pass no gradient on, or quantized weights themselves.

    Raises:
        ValueError: with the method of quantization and what to load instead.
    """
    base = base_causal_lm(model)
    quantizer = getattr(base, "hf_quantizer", None)
    if quantizer is None or not getattr(base, "is_quantized", False):
        return
    method = getattr(quantizer.quantization_config, "quant_method", "an unknown method")
    method = getattr(method, "value", method)
    if not quantizer.is_trainable:
        raise ValueError(
            f"model: {type(base).__name__} is quantized by {method}, and no gradient runs through such layers of "
            f"transformers: {_WAYS.get(method, _OTHER)}; for an adapter on 4-bit weights, bitsandbytes quantizes that "
            "(load_in_4bit)"
        )
    if not hasattr(model, "peft_config") and not getattr(quantizer, "is_qat_trainable", False):
        raise ValueError(
            f"model: {type(base).__name__} is quantized by {method}, and quantized weights cannot be trained "
            "themselves: give a peft_config for an adapter on them (LoRA), or load the model unquantized"
        )


def check_shardable(model: Any, gathered: torch.dtype | None) -> None:
    """Refuse 4-bit weights of bitsandbytes that FSDP2 cannot shard, or would round.

    Args:
        model: before it is sharded.
        gathered: the dtype in which FSDP2 gathers weights under mixed precision; None: as they are stored.

    Raises:
        ValueError: weights stored as integers, which accelerate would keep whole on every process; or in another
            floating dtype than they are gathered in, which would take their packed bits for numbers.
    """
    for name, weight in model.named_parameters():
        if type(weight).__name__ != "Params4bit":
            continue
        if weight.dtype == gathered or (gathered is None and weight.is_floating_point()):
            continue
        wanted = gathered or torch.bfloat16
        raise ValueError(
            f"bnb_4bit_quant_storage: expected {wanted}, so that FSDP2 can shard 4-bit weights as they are, got "
            f"{weight.dtype} of {name}: load the model with BitsAndBytesConfig(..., bnb_4bit_quant_storage={wanted})"
        )
