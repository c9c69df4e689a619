"""Models and datasets as the trainer uses them: loaded, adapted, with the log-prob head attached; tokenized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoTokenizer
from transformers.integrations.liger import apply_liger_kernel
from transformers.modeling_layers import GradientCheckpointingLayer

from dpofast.data.load import tokenize_preferences
from dpofast.head.engine.plan import HeadPlan
from dpofast.model.attach import attach_logprob_head
from dpofast.model.dropout import disable_dropout
from dpofast.model.load import load_causal_lm
from dpofast.model.parts import backbone_of, base_causal_lm, is_composite
from dpofast.model.wrappers import take_off_autocast
from dpofast.training.config import DPOConfig
from dpofast.training.fsdp import check_whole


class Models(NamedTuple):
    """The model to train, and its tokenizer or None where there is none beside the model."""

    policy: Any
    tokenizer: Any


def prepare_models(model: Any, ref_model: Any, args: DPOConfig, processing_class: Any, peft_config: Any) -> Models:
    """Load the model where it is a name, add the adapter, disable dropout, attach the log-prob head, compile layers.

    All but loading and the adapter is done to ref_model too, in place.

    Raises:
        ValueError: a reference that does not fit the model or the loss, weights that are sharded already,
            max_logits_bytes below one row of logits, or a model without layers to compile.
    """
    if ref_model is not None and ref_model is model:
        raise ValueError("ref_model: expected another model than `model`, or None for the model as it is now")
    loss = args.preference_loss()
    if ref_model is not None and not loss.needs_reference:
        raise ValueError(f"ref_model: loss_type {loss.kind!r} has no reference; leave it out")
    if isinstance(model, str):
        processing_class = processing_class or AutoTokenizer.from_pretrained(model)
        model = load_causal_lm(model, dtype=torch.float32)
    for each, name in ((model, "model"), (ref_model, "ref_model")):
        if each is not None and not hasattr(getattr(each, "config", None), "get_text_config"):
            raise ValueError(
                f"{name}: expected a causal language model of transformers (AutoModelForCausalLM), got "
                f"{type(each).__name__}"
            )
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
    absent = [name for name, weight in model.named_parameters() if weight.is_meta and weight.requires_grad]
    if absent:
        raise ValueError(
            f"model: expected trainable weights in memory, got {absent[0]} offloaded to the CPU or disk by accelerate: "
            "load it without device_map, or train an adapter on frozen weights"
        )
    for each in models:
        for module in {id(part): part for part in (each, base_causal_lm(each))}.values():
            take_off_autocast(module)  # of an earlier training: this one has its own
        if args.disable_dropout:
            disable_dropout(each)
        if args.use_liger_kernel:
            _use_liger_layers(each, args)
        if hasattr(each, "peft_config"):
            from dpofast.model.lora import fuse_lora

            fuse_lora(each)
        attach_logprob_head(each, padded=args.padded)
        _freeze_what_text_never_reaches(base_causal_lm(each))
        if args.torch_compile:
            _compile_layers(each, args)
    if len({vocabulary(each) for each in models}) > 1:
        raise ValueError(
            f"ref_model: expected the model's vocabulary of {vocabulary(model)} tokens, got {vocabulary(ref_model)}"
        )
    if args.max_logits_bytes is not None:  # refused here and not in the first step
        HeadPlan.make(1, model.get_output_embeddings().weight, args.max_logits_bytes, keep=True)
    args.torch_compile_backend = None  # done; accelerate would compile the whole model
    return Models(model, processing_class)


class PreferenceData:
    """Tokenizes the datasets of a run.

    Args:
        args: the trainer's.
        tokenizer: of the policy, or None for data that is token ids.
        vocab_size: of the policy, an upper bound of token ids.

    Attributes:
        reports: the DataReport of every dataset by its name ("train", "eval").
    """

    def __init__(self, args: DPOConfig, tokenizer: Any, vocab_size: int) -> None:
        """Keep the options of tokenize_preferences."""
        self.reports: dict[str, Any] = {}
        self._options = {
            "tokenizer": tokenizer,
            "max_length": args.max_length,
            "truncation_mode": args.truncation_mode,
            "on_bad_row": args.on_bad_row,
            "num_proc": args.dataset_num_proc,
            "vocab_size": vocab_size,
        }

    def tokenized(self, dataset: Dataset, name: str) -> Dataset:
        """Returns the token-level dataset, in numpy format.

        Raises:
            ValueError: no datasets.Dataset, or rows that cannot be used (DataError).
        """
        if not isinstance(dataset, Dataset):
            raise ValueError(f"{name}_dataset: expected a datasets.Dataset, got {type(dataset).__name__}")
        source = dataset.info.dataset_name or f"{name} data"
        tokens, self.reports[name] = tokenize_preferences(dataset, source=source, **self._options)
        return tokens.with_format("numpy")


def each_eval_dataset(prepare: Callable[[Dataset, str], Dataset], dataset: Any) -> Any:
    """Returns the prepared eval_dataset: a dataset, a dict of several (named "eval <key>"), or None."""
    if isinstance(dataset, dict):
        return {name: prepare(part, f"eval {name}") for name, part in dataset.items()}
    return None if dataset is None else prepare(dataset, "eval")


def vocabulary(model: Any) -> int:
    """Returns the number of rows of the input embedding."""
    return model.get_input_embeddings().weight.shape[0]


def _compile_layers(model: nn.Module, args: DPOConfig) -> None:
    """Compile every layer in place. Layers are alike, so one of them is traced; packing stays outside of them."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"torch_compile: expected a model of transformers' repeated layers (GradientCheckpointingLayer), which are "
            f"compiled one by one, and {type(model).__name__} has none: leave it off"
        )
    for layer in layers:
        layer.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)


def _freeze_what_text_never_reaches(model: Any) -> None:
    """A composite's encoders get no gradient from text; DDP would wait for it, and the optimizer would hold them."""
    if is_composite(model):
        reached = {id(p) for part in (backbone_of(model), model.get_output_embeddings()) for p in part.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in reached:
                parameter.requires_grad_(False)


def _use_liger_layers(model: nn.Module, args: DPOConfig) -> None:
    """Liger's fused layers, without its fused loss, whose forward would take the place of the packed one.

    The Trainer applies them again when training begins, which changes nothing; the reference is to run them too.
    """
    config = args.liger_kernel_config or {}
    if config.get("fused_linear_cross_entropy") or config.get("cross_entropy"):
        raise ValueError(
            "liger_kernel_config: expected no cross_entropy and no fused_linear_cross_entropy, which compute another "
            "loss: leave them out; the LM head is fused by dpofast"
        )
    if args.device.type == "cpu":
        raise ValueError(
            "use_liger_kernel: Liger's layers are Triton kernels and need a GPU, and this run is on the CPU: leave it "
            "off there"
        )
    args.liger_kernel_config = {**config, "cross_entropy": False, "fused_linear_cross_entropy": False}
    try:
        apply_liger_kernel(model, args.liger_kernel_config)
    except ImportError as error:
        raise ValueError(f"use_liger_kernel: {error}") from error
