"""vision_inputs: what a model's processor returns for one prompt -> PromptMedia, the media of an example for pack()."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpofast.model.parts import base_causal_lm
from dpofast.model.vision.families import VisionFamily, family_of, image_token_id
from dpofast.packing.arguments import integers
from dpofast.packing.media import ImageInput, PromptMedia


@dataclass(frozen=True)
class VisionInputs:
    """Divides a processor's output among the images of a prompt. It pickles, for loader processes.

    Attributes:
        config: the composite model's.
        token_id: of an image's placeholder.
    """

    config: Any
    token_id: int

    @property
    def family(self) -> VisionFamily:
        """How the model takes images."""
        family = family_of(self.config)
        assert family is not None
        return family

    def of_prompt(self, prompt_ids: Any, processed: Mapping[str, Any], name: str = "prompt") -> PromptMedia | None:
        """The media of one prompt; None where the processor saw no image.

        Args:
            prompt_ids: 1-D integers, with the placeholders that the processor put there.
            processed: its output for this prompt alone; other keys than the family's tensors are ignored.
            name: of the prompt in messages.

        Raises:
            ValueError: tensors that are missing, or that need another number of placeholders.
        """
        (media,) = self._of_rows([prompt_ids], processed, [name])
        return media

    def of_batch(self, rows: Sequence[Any], processed: Mapping[str, Any]) -> list[PromptMedia | None]:
        """The media of each row of one call of the processor for several prompts; None for rows without images.

        Equal images are one ImageInput.

        Args:
            rows: 1-D integers each, in the order of the processor's prompts, without padding.
            processed: its output for these rows.

        Raises:
            ValueError: as of_prompt does, naming the row.
        """
        return self._of_rows(rows, processed, [f"input_ids[{index}]" for index in range(len(rows))])

    def _of_rows(self, rows: Sequence[Any], processed: Mapping[str, Any], names: list[str]) -> list[PromptMedia | None]:
        placeholders = [
            int((integers(ids, f"{name}: prompt_ids") == self.token_id).sum())
            for ids, name in zip(rows, names, strict=True)
        ]
        tensors, units_of_row = self._tensors(processed, names)
        if not tensors:
            for name, count in zip(names, placeholders, strict=True):
                if count:
                    raise ValueError(
                        f"{name}: expected an image for {count} image placeholders (token id {self.token_id}), got no "
                        "pixel_values"
                    )
            return [None] * len(rows)
        counts = self._counts(tensors, names[0])
        units = len(counts["image_grid_thw" if self.family.patches else "pixel_values"])
        tokens = self.family.num_tokens(self.config, tensors)
        if tokens is None:  # images of one size
            tokens = [sum(placeholders) // units] * units
        if units_of_row is None:
            units_of_row = _units_of_rows(tokens, placeholders)
        parts = {key: tensor.split(counts[key]) for key, tensor in tensors.items()}
        known: dict[bytes, ImageInput] = {}
        media: list[PromptMedia | None] = []
        start = 0
        for name, count, width in zip(names, placeholders, units_of_row, strict=True):
            of_row = tokens[start : start + width]
            if sum(of_row) != count or min(of_row, default=1) < 1:
                raise ValueError(
                    f"{name}: expected {sum(of_row)} image placeholders (token id {self.token_id}) for pixel_values of "
                    f"{width} images, which have {of_row}, got {count}: take token ids and pixels from one call of "
                    "the processor, with the settings of the model's config, and cut no prompt inside an image"
                )
            images = []
            for i in range(start, start + width):
                # without padding, so that an image is equal beside larger ones
                cut = self.family.cut(self.config, {key: part[i] for key, part in parts.items()})
                image = ImageInput(cut, tokens[i])
                images.append(known.setdefault(image.key, image))
            media.append(PromptMedia(tuple(images), self.token_id) if images else None)
            start += width
        return media

    def _tensors(self, processed: Mapping[str, Any], names: list[str]) -> tuple[dict[str, Tensor], list[int] | None]:
        """The family's tensors on the CPU, images along the first dimension; {} without images.

        Also how many images each row has, where the tensors say so.
        """
        family, name, images = self.family, names[0], None
        found = {key: processed.get(key) for key in (*family.required, *family.optional)}
        if found["pixel_values"] is None or len(found["pixel_values"]) == 0:
            return {}, None
        missing = [key for key in family.required if found[key] is None]
        if missing:
            raise ValueError(f"{name}: expected {', '.join(family.required)} of the processor, got no {missing[0]}")
        tensors = {key: _tensor(value, f"{name}: {key}") for key, value in found.items() if value is not None}
        if family.nested:
            pixels, rows = tensors["pixel_values"], len(names)
            if len(pixels) != rows:
                raise ValueError(
                    f"{name}: expected the processor's output for {'one prompt' if rows == 1 else f'{rows} prompts'}, "
                    f"pixel_values of shape ({rows}, images, ...), got {tuple(pixels.shape)}"
                )
            # prompts with fewer images are padded by images of zeros
            real = (pixels != 0).flatten(2).any(-1) if rows > 1 else pixels.new_ones(pixels.shape[:2], dtype=torch.bool)
            images = real.sum(1).tolist()
            tensors = {key: tensor[real] for key, tensor in tensors.items()}
        if "batch_num_images" in tensors:  # of prompts, or of images one by one; here of each image: alone, or not
            sizes = tensors["batch_num_images"]
            tensors["batch_num_images"] = sizes.repeat_interleave(sizes).clamp(max=2)
        return tensors, images

    def _counts(self, tensors: Mapping[str, Tensor], name: str) -> dict[str, list[int]]:
        """Rows of each image in each tensor."""
        counts = {key: [1] * len(tensor) for key, tensor in tensors.items()}
        if self.family.patches:
            counts["pixel_values"] = tensors["image_grid_thw"].prod(-1).tolist()
        images = {len(count) for count in counts.values()}
        if len(images) > 1 or sum(counts["pixel_values"]) != len(tensors["pixel_values"]):
            shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
            raise ValueError(f"{name}: expected tensors of the same images from the processor, got shapes {shapes}")
        return counts


def vision_inputs(model_or_config: Any) -> VisionInputs:
    """How a composite model takes images.

    Raises:
        ValueError: images of this model are not supported, by name.
    """
    model = base_causal_lm(model_or_config)
    config = getattr(model, "config", model)
    if family_of(config) is None:
        name = type(model).__name__
        raise ValueError(f"{name}: images of {getattr(config, 'model_type', name)} models are not supported, only text")
    return VisionInputs(config, image_token_id(config))


def _units_of_rows(tokens: list[int], placeholders: list[int]) -> list[int]:
    """How many images, with these tokens each, fill the placeholders of each row; what is left is the last row's."""
    units, start = [], 0
    for count in placeholders[:-1]:
        end = start
        while end < len(tokens) and sum(tokens[start:end]) < count:
            end += 1
        units.append(end - start)
        start = end
    return [*units, len(tokens) - start]


def _tensor(value: Any, name: str) -> Tensor:
    """A processor's output as a tensor on the CPU: a tensor, arrays, or a list of equal ones.

    Raises:
        ValueError: a ragged list.
    """
    if isinstance(value, Tensor):
        return value.detach().cpu()
    try:
        if isinstance(value, (list, tuple)) and any(isinstance(part, Tensor) for part in value):
            return torch.stack([part.detach().cpu() for part in value])
        return torch.from_numpy(np.ascontiguousarray(np.asarray(value)))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: expected a tensor of the processor (return_tensors='pt'), {error}") from error
