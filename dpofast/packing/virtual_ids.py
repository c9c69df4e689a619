"""Virtual token ids, by which the packer tells the images of prompts apart.

Placeholders of different images are equal ids, so the packer would share rows between prompts with different images.
Before it runs, the placeholders of an image become a virtual id of its content, 2**30 + its number in the call. Equal
prompts with equal images are then one group, and sequences share exactly what is equal. In a packed row the virtual
ids say, in order, which images the vision tower must see; the placeholders are put back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpofast.packing.arguments import integers
from dpofast.packing.batch import PackedBatch
from dpofast.packing.media import BatchMedia, ImageInput, PromptMedia

_VIRTUAL = 2**30


class VirtualImages:
    """The distinct images of one call of `pack`, numbered by first appearance."""

    def __init__(self, token_id: int) -> None:
        """No image yet."""
        self.token_id = token_id
        self.images: list[ImageInput] = []
        self._numbers: dict[bytes, int] = {}

    def virtual_ids(self, prompt_ids: Any, media: PromptMedia, name: str) -> np.ndarray:
        """A prompt's ids, int64, with a virtual id in each placeholder.

        Raises:
            ValueError: media with another placeholder, or another number of placeholders than its images have.
        """
        if media.token_id != self.token_id:
            raise ValueError(
                f"{name}.media: expected {self.token_id} as the id of a placeholder, as for the examples before, got "
                f"{media.token_id}: pack the examples of one model in a call"
            )
        ids = integers(prompt_ids, f"{name}: prompt_ids").astype(np.int64)
        places, expected = ids == media.token_id, [image.num_tokens for image in media.images]
        if int(places.sum()) != sum(expected):
            raise ValueError(
                f"{name}: expected {sum(expected)} image placeholders (token id {media.token_id}) in prompt_ids, as "
                f"its {len(expected)} images have {expected}, got {int(places.sum())}: take token ids and media from "
                "one call of the processor, and cut no prompt inside an image"
            )
        ids[places] = _VIRTUAL + np.repeat([self._number(image) for image in media.images], expected)
        return ids

    def _number(self, image: ImageInput) -> int:
        number = self._numbers.setdefault(image.key, len(self.images))
        if number == len(self.images):
            self.images.append(image)
        return number

    def restored(self, batch: PackedBatch, vocab_size: int) -> PackedBatch:
        """A packed batch on the CPU with placeholders for the virtual ids, which are replaced in place, and its media.

        Raises:
            ValueError: naming the example: an id of vocab_size or more, a placeholder without an image, or prompts that
                part inside an image.
        """
        ids = batch.input_ids
        of_image = ids >= _VIRTUAL
        numbers = ids[of_image] - _VIRTUAL
        if len(numbers) and int(numbers.max()) >= len(self.images):
            row = int((ids >= _VIRTUAL + len(self.images)).int().argmax())
            raise ValueError(f"examples[{_example(batch, row)}]: expected token ids below 2**30, got {int(ids[row])}")
        self._check_other_ids(batch, of_image, vocab_size)
        if not len(numbers):
            return batch
        ids[of_image] = self.token_id
        runs, counts = numbers.unique_consecutive(return_counts=True)
        used = list(dict.fromkeys(runs.tolist()))
        images = [self.images[number] for number in used]
        place = torch.full((len(self.images),), -1)
        place[used] = torch.arange(len(used))
        image_of_row = torch.full_like(ids, -1)
        image_of_row[of_image] = place[numbers]
        lengths = torch.tensor([image.num_tokens for image in self.images])[runs]
        self._check_whole(batch, of_image, counts, lengths)
        names = list(images[0].tensors)
        if any(list(image.tensors) != names for image in images):
            raise ValueError(f"media: expected {', '.join(names)} of every image, as of the first, got other tensors")
        inputs = {name: _joined([image.tensors[name] for image in images]) for name in names}
        media = BatchMedia(
            token_id=self.token_id,
            inputs=inputs,
            shapes={name: tensor for name, tensor in inputs.items() if not tensor.is_floating_point()},
            counts={name: tuple(len(image.tensors[name]) for image in images) for name in names},
            num_tokens=tuple(image.num_tokens for image in images),
            image_of_row=image_of_row,
        )
        return replace(batch, media=media)

    def _check_other_ids(self, batch: PackedBatch, of_image: Tensor, vocab_size: int) -> None:
        """Check every id that is no virtual one, of rows and of targets: the packer has not, for these are larger."""
        rows = torch.cat(((~of_image).nonzero().squeeze(1), batch.logit_rows))
        ids = torch.cat((batch.input_ids[~of_image], batch.targets))
        for wrong, expected, where in (
            (ids >= vocab_size, f"token ids below vocab_size {vocab_size}", ""),
            (ids == self.token_id, "image placeholders in prompts with media alone", " in its text or in a response"),
        ):
            if bool(wrong.any()):
                place = int(wrong.int().argmax())
                raise ValueError(
                    f"examples[{_example(batch, int(rows[place]))}]: expected {expected}, got token id "
                    f"{int(ids[place])}{where}: take the row out"
                )

    def _check_whole(self, batch: PackedBatch, of_image: Tensor, counts: Tensor, lengths: Tensor) -> None:
        """Check that runs of placeholders, counts of them each, are whole images of these lengths in one segment."""
        starts = counts.cumsum(0) - counts
        inside = (torch.arange(int(counts.sum())) - starts.repeat_interleave(counts)) % lengths.repeat_interleave(
            counts
        )
        segments = batch.segments.by_row(torch.arange(batch.segments.num_segments))[of_image]
        parted = (inside[1:] > 0) & (segments[1:] != segments[:-1])
        broken = torch.nn.functional.pad(parted, (1, 0)) | (counts % lengths != 0).repeat_interleave(counts)
        if bool(broken.any()):
            row = int(of_image.nonzero()[int(broken.int().argmax())])
            raise ValueError(
                f"examples[{_example(batch, row)}]: expected the ids between the placeholders of an image to be the "
                "same in all prompts with this image, got prompts that part inside it"
            )


def with_virtual_ids(examples: Any) -> tuple[Any, VirtualImages | None]:
    """The examples with virtual ids for the placeholders of their images, and these; None where none has media.

    Media are read from mappings and from the column form of `pack`; Arrow tables have none.

    Raises:
        ValueError: naming the example, whose media are no PromptMedia or do not fit its prompt.
    """
    if isinstance(examples, Mapping):
        return _columns(examples)
    if getattr(getattr(examples, "format", None), "get", lambda _: None)("type") == "custom":  # a Dataset's transform
        examples = list(examples)
    elif isinstance(examples, Iterator):
        examples = list(examples)
    if not isinstance(examples, (list, tuple)):
        return examples, None
    media = [example.get("media") if isinstance(example, Mapping) else None for example in examples]
    images = _numbering(media)
    if images is None:
        return examples, None
    return [
        example
        if one is None or example.get("prompt_ids") is None
        else {**example, "prompt_ids": images.virtual_ids(example["prompt_ids"], one, f"examples[{index}]")}
        for index, (example, one) in enumerate(zip(examples, media, strict=True))
    ], images


def _columns(table: Mapping[str, Any]) -> tuple[Mapping[str, Any], VirtualImages | None]:
    media = list(table.get("media") or ())
    images = _numbering(media)
    prompts = table.get("prompt_ids")
    if images is None:
        return table, None
    if not isinstance(prompts, (tuple, list)) or len(prompts) != 2 or len(prompts[1]) != len(media) + 1:
        raise ValueError("media: expected one value an example beside prompt_ids as (values, offsets)")
    values, offsets = integers(prompts[0], "prompt_ids values").astype(np.int64), np.asarray(prompts[1])
    for index, one in enumerate(media):
        if one is not None:
            part = slice(int(offsets[index]), int(offsets[index + 1]))
            values[part] = images.virtual_ids(values[part], one, f"examples[{index}]")
    return {**table, "prompt_ids": (values, offsets)}, images


def _numbering(media: list[Any]) -> VirtualImages | None:
    """For the first prompt that has images; None where none has."""
    for index, one in enumerate(media):
        if one is not None and not isinstance(one, PromptMedia):
            raise ValueError(
                f"examples[{index}].media: expected a PromptMedia or None, got {type(one).__name__}: "
                "vision_inputs(model).of_prompt(prompt_ids, processed) makes one of a processor's output"
            )
    return next((VirtualImages(one.token_id) for one in media if one is not None), None)


def _joined(parts: list[Tensor]) -> Tensor:
    """The parts one after another along the first dimension, padded with zeros where they differ in another."""
    if len(parts) == 1:
        return parts[0]
    sizes = [max(size) for size in zip(*(part.shape[1:] for part in parts), strict=True)]
    whole = parts[0].new_zeros(sum(map(len, parts)), *sizes)
    start = 0
    for part in parts:
        whole[(slice(start, start + len(part)), *map(slice, part.shape[1:]))] = part
        start += len(part)
    return whole


def _example(batch: PackedBatch, row: int) -> int:
    """An example that a row of the packed batch belongs to."""
    last_rows = batch.logit_rows[batch.cu_targets[1:].long() - 1]
    # rows lie depth first: the next row that ends a sequence is of one that goes through this row
    sequence = int(torch.where(last_rows >= row, last_rows, batch.num_tokens).argmin())
    of_rows = batch.pairs if batch.columns.lists is None else batch.columns.lists
    return int(batch.pair_examples[int((of_rows == sequence).any(1).int().argmax())])
