"""Models as the trainer uses them: loaded, adapted, with the log-prob head attached."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer
from transformers.utils.hub import cached_file

from dpofast.head.planning.plan import HeadPlan
from dpofast.model.adapters import Wrapped, check_adapter, with_new_adapter
from dpofast.model.attach import attach_logprob_head
from dpofast.model.attention.flash import activate_flash_attention
from dpofast.model.dropout import disable_dropout
from dpofast.model.load import load_causal_lm
from dpofast.model.parts import backbone_of, base_causal_lm, is_composite
from dpofast.model.wrappers import take_off_autocast
from dpofast.training.config import DPOConfig
from dpofast.training.fsdp import check_whole
from dpofast.training.layers.choose import compile_chosen, fuse_layers

# One of them lies beside every model that has a tokenizer.
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


class Models(NamedTuple):
    """The model to train, the reference that was passed, the policy's tokenizer, and what a new adapter did to it.

    ref_model is None without one, tokenizer where there is none beside the model, wrapped without a peft_config. layers
    says what was chosen for the decoder layers by default, or is None.
    """

    policy: Any
    ref_model: Any
    tokenizer: Any
    wrapped: Wrapped | None
    layers: str | None


def prepare_models(
    model: Any,
    ref_model: Any,
    args: DPOConfig,
    processing_class: Any,
    peft_config: Any,
    quantization_config: Any = None,
) -> Models:
    """Load the models where they are names, add the adapter, disable dropout, attach the log-prob head, compile layers.

    All but loading and the adapter is done to ref_model too, in place.

    Raises:
        ValueError: a reference that does not fit the model or the loss, weights that are sharded already, a
            FlashAttention that cannot run here, max_logits_bytes below one row of logits, or a model without layers to
            compile.
    """
    if ref_model is not None and ref_model is model and not isinstance(model, str):
        raise ValueError("ref_model: expected another model than `model`, or None for the model as it is now")
    loss = args.preference_loss()
    if ref_model is not None and not loss.needs_reference:
        raise ValueError(f"ref_model: loss_type {loss.kind!r} has no reference; leave it out")
    if args.flash_attention is not None:
        activate_flash_attention(args.flash_attention, args.device)
    options = _loading_options(model, args, quantization_config)
    if processing_class is None:
        processing_class = tokenizer_beside(model, args, options)
    if isinstance(model, str):
        model = load_causal_lm(model, **options)
    if isinstance(ref_model, str):
        ref_model = load_causal_lm(ref_model, **options)
    for each, name in ((model, "model"), (ref_model, "ref_model")):
        if each is not None and not hasattr(getattr(each, "config", None), "get_text_config"):
            raise ValueError(
                f"{name}: expected a causal language model of transformers (AutoModelForCausalLM), got "
                f"{type(each).__name__}"
            )
    check_adapter(model, peft_config)
    wrapped = None if peft_config is None else with_new_adapter(model, peft_config)
    model = model if wrapped is None else wrapped.model
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
        for module in (each, base_causal_lm(each)):
            take_off_autocast(module)  # of an earlier training: this one has its own
        if args.disable_dropout:
            disable_dropout(each)
        fuse_layers(each, args)
        if hasattr(each, "peft_config"):
            from dpofast.model.lora import fuse_lora

            fuse_lora(each)
        attach_logprob_head(each, padded=args.padded)
        _freeze_what_text_never_reaches(base_causal_lm(each))
    if len({vocabulary(each) for each in models}) > 1:
        raise ValueError(
            f"ref_model: expected the model's vocabulary of {vocabulary(model)} tokens, got {vocabulary(ref_model)}"
        )
    if args.max_logits_bytes is not None:  # refused here and not in the first step
        HeadPlan.make(1, model.get_output_embeddings().weight, args.max_logits_bytes, keep=True)
    layers = compile_chosen(models, args)
    args.torch_compile_backend = None  # done; accelerate would compile the whole model
    return Models(model, ref_model, processing_class, wrapped, layers)


def check_where_it_runs(
    model: Any, args: DPOConfig, autocast: Callable[[], contextlib.AbstractContextManager[Any]]
) -> None:
    """Compare an attached model's log-probs with its own again where it runs: on its device, in its precision.

    A model that was loaded by name was attached on the CPU, in float32, where another attention runs.

    Raises:
        ValueError: as attach_logprob_head's.
    """
    with autocast():
        attach_logprob_head(model, padded=args.padded)


def _loading_options(model: Any, args: DPOConfig, quantization_config: Any) -> dict[str, Any]:
    """from_pretrained's, of model_init_kwargs, trust_remote_code and quantization_config; dtype float32 by default.

    Raises:
        ValueError: they are given for a model that is loaded already, or twice.
    """
    given = args.model_init_kwargs
    if given is not None and not isinstance(given, dict):
        raise ValueError(f"model_init_kwargs: expected a dict of from_pretrained's arguments, got {given!r}")
    if not isinstance(model, str):
        for name, value in (("model_init_kwargs", given), ("quantization_config", quantization_config)):
            if value is not None:
                raise ValueError(f"{name}: the model is loaded already: give its name or folder, or leave {name} out")
        given = None
    options = {"dtype": torch.float32, "trust_remote_code": args.trust_remote_code, **(given or {})}
    if quantization_config is not None:
        if "quantization_config" in options:
            raise ValueError("quantization_config: given twice, also in model_init_kwargs: leave one out")
        options["quantization_config"] = quantization_config
    return options


def tokenizer_beside(model: Any, args: DPOConfig, options: dict[str, Any]) -> Any:
    """The tokenizer that lies beside a model, or None: token ids need none.

    transformers would make an empty one up for a folder without tokenizer files, and Trainer would save it and set the
    model's special tokens by it.
    """
    name = model if isinstance(model, str) else model.config.name_or_path
    hub = {key: options[key] for key in ("revision", "token", "cache_dir", "subfolder") if key in options}
    found = bool(name) and any(
        cached_file(
            name,
            file,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
            **hub,
        )
        for file in _TOKENIZER_FILES
    )
    return AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code, **hub) if found else None


def vocabulary(model: Any) -> int:
    """Returns the number of rows of the input embedding."""
    return model.get_input_embeddings().weight.shape[0]


def _freeze_what_text_never_reaches(model: Any) -> None:
    """A composite's encoders get no gradient from text; DDP would wait for it, and the optimizer would hold them."""
    if is_composite(model):
        reached = {id(p) for part in (backbone_of(model), model.get_output_embeddings()) for p in part.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in reached:
                parameter.requires_grad_(False)


@contextlib.contextmanager
def kept_use_cache(model: Any) -> Iterator[None]:
    """Restore config.use_cache, which Trainer turns off: the saved model would generate without a cache."""
    use_cache = getattr(model.config, "use_cache", None)
    yield
    if use_cache is not None:
        model.config.use_cache = use_cache
