"""A composite model's own forward over packed or padded rows: the features of images in the place of placeholders.

The vision tower, the projector and the merging are the model's own code, whatever it does there. Only its language
model is called with other arguments: those of a packed row, which no other layer sees.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dpofast.model.parts import backbone_of, whole_backbone
from dpofast.model.vision.families import family_of
from dpofast.packing.batch import PackedBatch
from dpofast.packing.media import BatchMedia
from dpofast.reference import padded_logprobs


def packed_with_images(model: Any, input_ids: Tensor, media: BatchMedia, **options: Any) -> Any:
    """The language model's output over a packed row (1, T) with images; options are the arguments of its call."""
    inputs = _arguments(model, media, torch.arange(len(media.image_of_row)))
    language_model, thread, outputs = backbone_of(model), threading.get_ident(), []

    def exchange(module: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        return (args, {**given, **options}) if threading.get_ident() == thread else None

    def keep(module: Any, args: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            outputs.append(output)

    handles = (
        language_model.register_forward_pre_hook(exchange, prepend=True, with_kwargs=True),
        language_model.register_forward_hook(keep),
    )
    try:
        with idle_call(model, media):
            whole_backbone(model)(
                input_ids=input_ids,
                attention_mask=options["attention_mask"],
                position_ids=options["position_ids"],
                use_cache=False,
                **inputs,
            )
    finally:
        for handle in handles:
            handle.remove()
    (output,) = outputs
    return output


@contextlib.contextmanager
def idle_call(model: Any, media: BatchMedia | None) -> Iterator[None]:
    """Inside, the composite's forward calls the vision tower on idle images too, where it calls it on others.

    Between the embedding of token ids and the language model: sharded weights are gathered in one order on all ranks.
    Features enter with the factor 0, so that all gradients are those without them, and those of the tower 0.
    """
    if media is None or not media.is_idle:
        yield
        return
    thread = threading.get_ident()

    def with_zero(module: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if threading.get_ident() != thread:
            return None
        found = whole_backbone(model).get_image_features(**_forward_arguments(model, media.inputs), return_dict=True)
        features = (found.pooler_output, getattr(found, "deepstack_features", None))
        words = given["inputs_embeds"]
        zero = torch.stack([(tensor * 0).sum() for tensor in _tensors(features)]).sum()
        return args, {**given, "inputs_embeds": words + zero.to(words)}

    handle = backbone_of(model).register_forward_pre_hook(with_zero, prepend=True, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _tensors(features: Any) -> list[Tensor]:
    """The tensors in nested lists and tuples."""
    if isinstance(features, Tensor):
        return [features]
    return [tensor for part in features or () for tensor in _tensors(part)]


def padded_inputs(model: Any, batch: PackedBatch, rows: Tensor, width: int) -> Mapping[str, Any]:
    """Further arguments of a composite's forward over padded rows, by the packed rows (R, L) of their positions.

    Args:
        model: the composite.
        batch: with media.
        rows: int64 on any device, −1 past a sequence's end.
        width: positions of the padded rows.
    """
    family, media = family_of(model.config), batch.media
    assert family is not None and media is not None
    rows = rows[:, :width].cpu()
    kinds = (media.image_of_row[rows.clamp(min=0)] >= 0) & (rows >= 0)
    arguments = _arguments(model, media, rows[rows >= 0])
    if family.token_types is not None:
        arguments[family.token_types] = kinds.long().to(batch.input_ids.device)
    return arguments


def _arguments(model: Any, media: BatchMedia, rows: Tensor) -> dict[str, Any]:
    """The arguments of the forward that describe the images in these packed rows; {} where there are none."""
    images = media.images_in(rows)
    if not images:
        return {}
    return _forward_arguments(model, media.inputs_of(images))


def _forward_arguments(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of the forward, from the joined tensors of its images in order."""
    family = family_of(model.config)
    assert family is not None
    # some vision towers cast their pixels and some do not
    return family.arguments(
        {name: tensor.to(model.dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    )


def own_logprobs(model: Any, batch: PackedBatch) -> Tensor:
    """(N,) log-probs of the batch's targets by the model's own forward and logits, each sequence with images alone."""
    ids, attended, in_response = batch.padded()
    if batch.media is None:
        return padded_logprobs(model, ids, attended, in_response, use_cache=False)
    rows, parts = torch.nn.functional.pad(batch.paths(), (0, 1), value=-1), []
    for s, length in enumerate(attended.sum(1).tolist()):
        one = (tensor[s : s + 1, :length] for tensor in (ids, attended, in_response))
        inputs = padded_inputs(model, batch, rows[s : s + 1], length)
        parts.append(padded_logprobs(model, *one, use_cache=False, **inputs))
    return torch.cat(parts)
