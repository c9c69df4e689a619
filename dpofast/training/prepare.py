"""What the trainer does to the models it is given before it begins."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

from dpofast.checkpointing.fsdp import check_whole
from dpofast.head.engine.plan import HeadPlan
from dpofast.model.attach import attach_logprob_head
from dpofast.training.config import DPOConfig


def prepared_model(
    model: Any, ref_model: Any, args: DPOConfig, processing_class: Any, peft_config: Any
) -> tuple[Any, Any]:
    """Load what is a name, add the adapter, set dropout to 0, attach the log-prob head to both models, compile.

    Returns:
        The model to train and its tokenizer, None where there is none beside the model.

    Raises:
        ValueError: a reference that does not fit the model or the loss, weights that are sharded already, a budget
            below one row of logits, or a model without layers to compile.
    """
    if ref_model is not None and ref_model is model:
        raise ValueError("ref_model: expected another model than `model`, or None for the model as it is now")
    loss = args.preference_loss()
    if ref_model is not None and not loss.needs_reference:
        raise ValueError(f"ref_model: loss_type {loss.kind!r} has no reference; leave it out")
    if isinstance(model, str):
        processing_class = processing_class or AutoTokenizer.from_pretrained(model)
        model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if processing_class is None and model.config.name_or_path:  # token ids need none
        processing_class = AutoTokenizer.from_pretrained(model.config.name_or_path)
    if peft_config is not None:
        from peft import get_peft_model

        model = get_peft_model(model, peft_config)
    models = [model] if ref_model is None else [model, ref_model]
    for each, name in zip(models, ("model", "ref_model"), strict=False):
        if hasattr(each, "_orig_mod"):
            raise ValueError(f"{name}: expected a model, got torch.compile's wrapper of one: set torch_compile instead")
        check_whole(each, name)
    for each in models:
        if args.disable_dropout:
            _disable_dropout(each)
        if hasattr(each, "peft_config"):
            from dpofast.model.lora import fuse_lora

            fuse_lora(each)
        attach_logprob_head(each, padded=args.padded)
        if args.torch_compile:
            _compile_layers(each, args)
    if len({vocabulary(each) for each in models}) > 1:
        raise ValueError(
            f"ref_model: expected the model's vocabulary of {vocabulary(model)} tokens, got {vocabulary(ref_model)}"
        )
    if args.max_logits_bytes is not None:  # refused here and not in the first step
        HeadPlan.make(1, model.get_output_embeddings().weight, args.max_logits_bytes, keep=True)
    return model, processing_class


def vocabulary(model: Any) -> int:
    """Rows of the embedding."""
    return model.get_input_embeddings().weight.shape[0]


def _compile_layers(model: nn.Module, args: DPOConfig) -> None:
    """In place, each of its own: they are alike, so that one is traced, and what packs lies outside of them."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"torch_compile: expected a model of transformers' repeated layers (GradientCheckpointingLayer), which are "
            f"compiled one by one, and {type(model).__name__} has none: leave it off"
        )
    for layer in layers:
        layer.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)


def _disable_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # transformers hands this number to its attention functions
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]
