"""Models as the trainer uses them: loaded, adapted, with the log-prob head attached."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from dpofast.checkpointing.zero import whole, whole_shape
from dpofast.common.ranks import Ranks
from dpofast.head.planning.plan import HeadPlan
from dpofast.model.adapters import Wrapped, check_adapter, with_new_adapter
from dpofast.model.attach import attach_logprob_head
from dpofast.model.attention.flash import activate_flash_attention
from dpofast.model.checks.images import images_refused
from dpofast.model.checks.parity import check_shards
from dpofast.model.checks.quantized import check_quantized
from dpofast.model.checks.split import check_split
from dpofast.model.dropout import disable_dropout
from dpofast.model.load import config_of, load_causal_lm
from dpofast.model.parallel.mapped import load_to_shard
from dpofast.model.parts import base_causal_lm, beside_text, is_composite
from dpofast.model.vision.tower import tower_parameters
from dpofast.model.wrappers import take_off_autocast
from dpofast.training.checks.images import has_images
from dpofast.training.config import DPOConfig
from dpofast.training.layers.choose import compile_chosen, fuse_layers
from dpofast.training.parallel.early import on_shards
from dpofast.training.parallel.fsdp import asks_for, check_whole
from dpofast.training.parallel.sequence import WITHOUT_DIVIDED_IMAGES
from dpofast.training.parallel.sizes import check_heads
from dpofast.training.parallel.tensor import adopt_size, check_plan, loading_options, reshard_always, second_reference
from dpofast.training.processing import WITHOUT_IMAGES, Processing, processing_beside, processing_of


class Models(NamedTuple):
    """The model to train, the reference that was passed, what reads their data, and what a new adapter did to it.

    ref_model is None without one, wrapped without a peft_config. layers says what was chosen for the decoder layers by
    default, or is None. with_images: prompts of the training data have some.
    """

    policy: Any
    ref_model: Any
    processing: Processing
    wrapped: Wrapped | None
    layers: str | None
    with_images: bool


def prepare_models(
    model: Any,
    ref_model: Any,
    args: DPOConfig,
    processing_class: Any,
    peft_config: Any,
    quantization_config: Any = None,
    train_dataset: Any = None,
) -> Models:
    """Load the models where they are names, add the adapter, disable dropout, attach the log-prob head, compile layers.

    All but loading and the adapter is done to ref_model too, in place. The weights of a composite model that training
    does not reach are frozen: without images those of all its encoders, with freeze_vision_tower the vision tower's.

    Args:
        model: the policy, or its name.
        ref_model: the reference, or its name, or None.
        args: the trainer's.
        processing_class: a tokenizer or processor; None for the one beside the model.
        peft_config: of a new adapter, or None.
        quantization_config: for models given by name.
        train_dataset: the training data, or None.

    Raises:
        ValueError: heads that tensor or sequence parallelism cannot divide (before anything is loaded), a reference
            that does not fit the model or the loss, weights that are sharded already, a
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
    name_of_model = model if isinstance(model, str) else None
    if peft_config is None:
        ref_model = ref_model or (second_reference(model, args) if isinstance(model, str) else None)
    given = {"model": model, "ref_model": ref_model}
    for name, each in given.items():
        if not isinstance(each, str) and hasattr(each, "config"):
            adopt_size(each, args, name)
    if args.tensor_parallel_size * args.sequence_parallel_size > 1:
        for each in filter(None, given.values()):
            config = config_of(each, **options) if isinstance(each, str) else each.config
            check_heads(config, args)
            if args.tensor_parallel_size > 1:
                check_plan(config, args)
    # An adapter's first values would be rounded to the dtype of the weights that it is put on.
    load = load_to_shard if asks_for(args, "fsdp") and peft_config is None else load_causal_lm
    model, ref_model = (
        load(each, **loading_options(config_of(each, **options), args, options)) if isinstance(each, str) else each
        for each in given.values()
    )
    for each, name in ((model, "model"), (ref_model, "ref_model")):
        if each is not None and not hasattr(getattr(each, "config", None), "get_text_config"):
            raise ValueError(
                f"{name}: expected a causal language model of transformers (AutoModelForCausalLM), got "
                f"{type(each).__name__}"
            )
        if each is not None:
            reshard_always(each)
    failure, with_images = None, has_images(train_dataset)
    if processing_class is None:
        processing_class, failure = processing_beside(name_of_model, model, args, options)
    check_adapter(model, peft_config)
    wrapped = None if peft_config is None else with_new_adapter(model, peft_config)
    model = model if wrapped is None else wrapped.model
    check_quantized(model)
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
        _freeze(base_causal_lm(each), args, with_images=with_images)
    if len({vocabulary(each) for each in models}) > 1:
        raise ValueError(
            f"ref_model: expected the model's vocabulary of {vocabulary(model)} tokens, got {vocabulary(ref_model)}"
        )
    if args.max_logits_bytes is not None:  # refused here and not in the first step
        head = model.get_output_embeddings().weight
        with whole(head):
            HeadPlan.make(1, head, args.max_logits_bytes, keep=True)
    layers = compile_chosen(models, args)
    args.torch_compile_backend = None  # done; accelerate would compile the whole model
    processing = processing_of(processing_class, failure, model, ref_model)
    if args.sequence_parallel_size > 1:
        processing = processing._replace(images=None, refused=WITHOUT_DIVIDED_IMAGES)
    if with_images and processing.refused is not None:
        raise ValueError(f"train_dataset: it has images: {processing.refused}. {WITHOUT_IMAGES}")
    return Models(model, ref_model, processing, wrapped, layers, with_images)


def check_where_it_runs(
    model: Any,
    args: DPOConfig,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]],
    *,
    with_images: bool = False,
    dtype: torch.dtype | None = None,
    ranks: Ranks | None = None,
    group: Any = None,
) -> None:
    """Compare an attached model's log-probs with its own again where it runs: on its device, in its precision.

    A model that was loaded by name was attached on the CPU, in float32, where another attention runs. A collective
    where the model is sharded, and with a group that shares rows, where those of divided rows are compared, too.

    Args:
        model: attached, on its device or sharded.
        args: the trainer's.
        autocast: what it runs in.
        with_images: it must take images.
        dtype: in which a sharded model's weights are gathered.
        ranks: all processes; needed where the model is sharded.
        group: the process group that computes each micro-batch together (sequence parallelism), or None.

    Raises:
        ValueError: as attach_logprob_head's and check_split's; with images, that the model takes none here.
    """
    with autocast(), on_shards(model) as sharded:
        if sharded:
            check_shards(model, dtype, (ranks or Ranks.alone()).everyone.all_reduce_max)
        else:
            attach_logprob_head(model, padded=args.padded)
        if group is not None:
            check_split(model, group, dtype)
    if with_images and (reason := images_refused(model)) is not None:
        raise ValueError(reason)


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


def vocabulary(model: Any) -> int:
    """Returns the number of rows of the input embedding."""
    return whole_shape(model.get_input_embeddings().weight)[0]


def _freeze(model: Any, args: DPOConfig, *, with_images: bool) -> None:
    """Freeze a composite's encoders where no image reaches them, and the vision tower where args say so.

    They get no gradient from text; DDP would wait for it, and the optimizer would hold them.

    Raises:
        ValueError: freeze_vision_tower for a model without one.
    """
    if not is_composite(model):
        if args.freeze_vision_tower:
            raise ValueError(f"freeze_vision_tower: {type(model).__name__} has no vision tower: leave it out")
        return
    if not with_images or images_refused(model) is not None:
        for parameter in beside_text(model):
            parameter.requires_grad_(False)
    elif args.freeze_vision_tower:
        for parameter in tower_parameters(model):
            parameter.requires_grad_(False)


@contextlib.contextmanager
def kept_use_cache(model: Any) -> Iterator[None]:
    """Restore config.use_cache, which Trainer turns off: the saved model would generate without a cache."""
    use_cache = getattr(model.config, "use_cache", None)
    yield
    if use_cache is not None:
        model.config.use_cache = use_cache
