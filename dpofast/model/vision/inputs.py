"""vision_inputs: what a model's processor returns for one prompt -> PromptMedia, the media of an example for pack()."""

from __future__ import annotations

from collections.abc import Mapping
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
        tensors = self._tensors(processed, name)
        placeholders = int((integers(prompt_ids, f"{name}: prompt_ids") == self.token_id).sum())
        if not tensors:
            if placeholders:
                raise ValueError(
                    f"{name}: expected an image for {placeholders} image placeholders (token id {self.token_id}), got "
                    "no pixel_values"
                )
            return None
        counts = self._counts(tensors, name)
        units = len(counts["image_grid_thw" if self.family.patches else "pixel_values"])
        tokens = self.family.num_tokens(self.config, tensors)
        if tokens is None:  # images of one size
            tokens = [placeholders // units] * units
        if sum(tokens) != placeholders or min(tokens, default=0) < 1:
            raise ValueError(
                f"{name}: expected {sum(tokens)} image placeholders (token id {self.token_id}) for pixel_values of "
                f"{units} images, which have {tokens}, got {placeholders}: take token ids and pixels from one call of "
                "the processor, with the settings of the model's config, and cut no prompt inside an image"
            )
        parts = {key: tensor.split(counts[key]) for key, tensor in tensors.items()}
        # without padding, so that an image is equal beside larger ones
        images = [self.family.cut(self.config, {key: part[i] for key, part in parts.items()}) for i in range(units)]
        return PromptMedia(tuple(map(ImageInput, images, tokens)), self.token_id)

    def _tensors(self, processed: Mapping[str, Any], name: str) -> dict[str, Tensor]:
        """The family's tensors on the CPU, images along the first dimension; {} without images."""
        family = self.family
        found = {key: processed.get(key) for key in (*family.required, *family.optional)}
        if found["pixel_values"] is None or len(found["pixel_values"]) == 0:
            return {}
        missing = [key for key in family.required if found[key] is None]
        if missing:
            raise ValueError(f"{name}: expected {', '.join(family.required)} of the processor, got no {missing[0]}")
        tensors = {key: _tensor(value, f"{name}: {key}") for key, value in found.items() if value is not None}
        if family.nested:
            if len(tensors["pixel_values"]) != 1:
                raise ValueError(
                    f"{name}: expected the processor's output for one prompt, pixel_values of shape (1, images, ...), "
                    f"got {tuple(tensors['pixel_values'].shape)}"
                )
            tensors = {key: tensor[0] for key, tensor in tensors.items()}
        if "batch_num_images" in tensors:  # of prompts, or of images one by one; here of each image: alone, or not
            sizes = tensors["batch_num_images"]
            tensors["batch_num_images"] = sizes.repeat_interleave(sizes).clamp(max=2)
        return tensors

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
