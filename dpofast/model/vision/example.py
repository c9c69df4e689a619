"""A preference pair with a small random image, as a family's processor would make it, for the parity check."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpofast.model.parts import text_token_ids, whole_backbone
from dpofast.model.vision.families import family_of, own_model, side
from dpofast.model.vision.inputs import vision_inputs
from dpofast.model.wrappers import input_device


def example_with_image(model: Any) -> dict[str, Any]:
    """An example for pack(): random ids of text around the placeholders of one random image, and its media."""
    inputs, generator = vision_inputs(model), torch.Generator().manual_seed(0)
    processed = random_image(model.config, generator)
    tokens = inputs.family.num_tokens(model.config, processed)
    count = tokens[0] if tokens else _features(model, processed)
    text = text_token_ids(model)
    before, after, chosen, rejected = (
        text[torch.randint(0, len(text), (length,), generator=generator)] for length in (3, 2, 4, 6)
    )
    # responses that differ in their first token are distinct branches, whatever the draw
    rejected[0] = text[(int(torch.searchsorted(text, chosen[0])) + 1) % len(text)]
    prompt = torch.cat((before, torch.full((count,), inputs.token_id), after)).numpy()
    return {
        "prompt_ids": prompt,
        "chosen_ids": chosen.numpy(),
        "rejected_ids": rejected.numpy(),
        "media": inputs.of_prompt(prompt, processed),
    }


def _features(model: Any, processed: dict[str, Tensor]) -> int:
    """How many features the model makes of one image, where its config does not say."""
    tensors = {name: tensor.to(input_device(model)) for name, tensor in processed.items()}
    tensors["pixel_values"] = tensors["pixel_values"].to(model.dtype)
    features = whole_backbone(model).get_image_features(**tensors, return_dict=True).pooler_output
    return sum(len(of_image) for of_image in features)


def random_image(config: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """What the family's processor returns for one small image; the pixels are normal."""
    family, vision = family_of(config), config.vision_config
    assert family is not None
    channels = int(getattr(vision, "in_channels", None) or getattr(vision, "num_channels", None) or 3)

    def pixels(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    patch = side(vision.patch_size)
    if family.patches:
        rows, columns = 2 * vision.spatial_merge_size, 3 * vision.spatial_merge_size
        dim = channels * side(vision.temporal_patch_size) * patch**2
        return {"pixel_values": pixels(rows * columns, dim), "image_grid_thw": torch.tensor([[1, rows, columns]])}
    if config.model_type == "lfm2_vl":
        rows, columns = 2 * config.downsample_factor, 3 * config.downsample_factor
        return {
            "pixel_values": pixels(1, rows * columns, channels * patch**2),
            "spatial_shapes": torch.tensor([[rows, columns]]),
            "pixel_attention_mask": torch.ones(1, rows * columns, dtype=torch.int32),
        }
    if vision.model_type == "pixtral":
        height, width = (n * patch * getattr(config, "spatial_merge_size", 1) for n in (2, 3))
        return {"pixel_values": pixels(1, channels, height, width), "image_sizes": torch.tensor([[height, width]])}
    size = side(vision.image_size)
    if "image_sizes" in family.required:
        module, _ = own_model(config)
        tiles = module.image_size_to_num_patches([size, size], config.image_grid_pinpoints, size)
        return {"pixel_values": pixels(1, tiles, channels, size, size), "image_sizes": torch.tensor([[size, size]])}
    shape = (1, 1, channels, size, size) if family.nested else (1, channels, size, size)
    return {"pixel_values": pixels(*shape)}
