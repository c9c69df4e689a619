"""What the processors of composite families return for images, and how many placeholders an image has in a prompt.

The unit is what the vision tower sees by itself: an image, or for Idefics 3, InternVL and LFM2-VL a tile of one. All
tensors but those of `patches` have one row for each.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

_CLASS_TOKEN = ("clip_vision_model", "internvl_vision", "chinese_clip_vision_model", "dinov2")


@dataclass(frozen=True, kw_only=True)
class VisionFamily:
    """How a family takes images.

    Attributes:
        required: names of the processor's tensors.
        optional: more of them, where the processor returns them.
        num_tokens: (config, tensors of n images) -> placeholders of each, (n,); None where the config does not say.
        patches: whether pixel_values has a row for each patch, as image_grid_thw counts them, instead of each image.
        nested: whether the tensors have a dimension of prompts before that of images.
        token_types: the argument of the model's forward that is 1 for placeholders and 0 for text, if it has one.
        cut: (config, tensors of one image) -> the same without what the processor pads them with beside larger images.
        inside: why an image is not attended to causally; None where it is.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    num_tokens: Callable[[Any, Mapping[str, Tensor]], list[int] | None]
    patches: bool = False
    nested: bool = False
    token_types: str | None = None
    cut: Callable[[Any, dict[str, Tensor]], dict[str, Tensor]] = lambda config, image: image
    inside: str | None = None

    def arguments(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """The arguments of the model's forward, from the joined tensors of its images in order."""
        arguments: dict[str, Any] = dict(inputs)
        if self.nested:
            arguments = {name: tensor[None] for name, tensor in arguments.items()}
        if "batch_num_images" in arguments:
            arguments["batch_num_images"] = _prompt_sizes(arguments["batch_num_images"].tolist())
        return arguments


def family_of(config: Any) -> VisionFamily | None:
    """The family of a composite model's config; None for one whose images are not supported."""
    return FAMILIES.get(getattr(config, "model_type", None) or "")


def image_token_id(config: Any) -> int:
    """The id of a placeholder."""
    value = getattr(config, "image_token_id", None)
    return int(config.image_token_index if value is None else value)


def _prompt_sizes(images: list[int]) -> list[int]:
    """The batch_num_images of images that are alone in their prompt (1) or are not (2): lone ones are cut into tiles.

    A packed row contains shared images once, so that the sizes of its prompts do not add up; the model only asks which
    are 1. An image that is not alone never stands between lone ones: others follow in the subtree of its rows.
    """
    sizes: list[int] = []
    for alone, group in groupby(images, key=lambda size: size == 1):
        count = len(list(group))
        assert alone or count > 1
        sizes += [1] * count if alone else [count]
    return sizes


def side(value: Any) -> int:
    """A size that configs hold as a number or as (height, width)."""
    return int(value[0] if isinstance(value, (list, tuple)) else value)


def _grid(config: Any, tensors: Mapping[str, Tensor]) -> list[int]:
    merged: Tensor = tensors["image_grid_thw"].prod(-1) // config.vision_config.spatial_merge_size**2
    return merged.tolist()


def tower_tokens(config: Any) -> int | None:
    """Features of a tile of fixed size, of a vision tower that is known to have a class token or to have none."""
    vision = config.vision_config
    if not hasattr(vision, "image_size") or vision.model_type not in (*_CLASS_TOKEN, "siglip_vision_model"):
        return None
    features = (side(vision.image_size) // side(vision.patch_size)) ** 2 + (vision.model_type in _CLASS_TOKEN)
    return features - (config.vision_feature_select_strategy == "default")


def _llava(config: Any, tensors: Mapping[str, Tensor]) -> list[int] | None:
    if config.vision_config.model_type == "pixtral":
        sizes: Tensor = tensors["image_sizes"] // side(config.vision_config.patch_size)
        return sizes.prod(-1).tolist()
    tokens = tower_tokens(config)
    return None if tokens is None else [tokens] * len(tensors["pixel_values"])


def _tiled(config: Any, tensors: Mapping[str, Tensor]) -> list[int] | None:
    """By the model's own joining of tiles, over features of zeros that are one channel wide."""
    tokens = tower_tokens(config)
    if tokens is None:
        return None
    _, cls = own_model(config)
    features = [torch.zeros(count, tokens, 1) for count in _tiles(config, tensors)]
    option = "vision_feature_select_strategy" if config.model_type == "llava_next" else "vision_aspect_ratio"
    options = {option: getattr(config, option)}
    own = SimpleNamespace(config=config)
    packed = cls.pack_image_features(own, features, tensors["image_sizes"], image_newline=torch.zeros(1), **options)
    return [len(feature) for feature in packed[0]]


def _tiles(config: Any, tensors: Mapping[str, Tensor]) -> list[int]:
    module, _ = own_model(config)
    sizes = tensors["image_sizes"]
    lone = tensors["batch_num_images"] == 1 if "batch_num_images" in tensors else torch.ones(len(sizes))
    tile = side(config.vision_config.image_size)
    return [
        module.image_size_to_num_patches(size, config.image_grid_pinpoints, tile) if alone else 1
        for size, alone in zip(sizes, lone.tolist(), strict=True)
    ]


def _cut_tiles(config: Any, image: dict[str, Tensor]) -> dict[str, Tensor]:
    (tiles,) = _tiles(config, image)
    return {**image, "pixel_values": image["pixel_values"][:, :tiles]}


def _cut_pixels(config: Any, image: dict[str, Tensor]) -> dict[str, Tensor]:
    if "image_sizes" not in image:
        return image
    height, width = image["image_sizes"][0].tolist()
    return {**image, "pixel_values": image["pixel_values"][..., :height, :width]}


def _cut_patches(config: Any, image: dict[str, Tensor]) -> dict[str, Tensor]:
    patches = int(image["spatial_shapes"].prod())
    return {**image, **{name: image[name][:, :patches] for name in ("pixel_values", "pixel_attention_mask")}}


def own_model(config: Any) -> tuple[Any, Any]:
    """The module of transformers with the model of a config, and its class without head."""
    from transformers import AutoModel

    cls: Any = AutoModel._model_mapping[type(config)]
    return sys.modules[cls.__module__], cls


def _merged_sizes(config: Any, tensors: Mapping[str, Tensor]) -> list[int]:
    sizes: Tensor = tensors["image_sizes"] // (side(config.vision_config.patch_size) * config.spatial_merge_size)
    return sizes.prod(-1).tolist()


def _shuffled(config: Any, tensors: Mapping[str, Tensor]) -> list[int]:
    patches = side(config.vision_config.image_size) // side(config.vision_config.patch_size)
    factor = config.scale_factor if hasattr(config, "scale_factor") else round(1 / config.downsample_ratio)
    return [(patches // factor) ** 2] * len(tensors["pixel_values"])


def _unshuffled(config: Any, tensors: Mapping[str, Tensor]) -> list[int]:
    shapes: Tensor = tensors["spatial_shapes"] // config.downsample_factor
    return shapes.prod(-1).tolist()


def _gemma3(config: Any, tensors: Mapping[str, Tensor]) -> list[int]:
    return [config.mm_tokens_per_image] * len(tensors["pixel_values"])


_QWEN = VisionFamily(
    required=("pixel_values", "image_grid_thw"), num_tokens=_grid, patches=True, token_types="mm_token_type_ids"
)
_TILES = VisionFamily(required=("pixel_values",), optional=("pixel_attention_mask",), num_tokens=_shuffled, nested=True)
# By model type
FAMILIES = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), _QWEN),
    **dict.fromkeys(("glm4v", "glm4v_moe", "glm46v"), _QWEN),
    "llava": VisionFamily(required=("pixel_values",), optional=("image_sizes",), num_tokens=_llava, cut=_cut_pixels),
    "llava_next": VisionFamily(required=("pixel_values", "image_sizes"), num_tokens=_tiled, cut=_cut_tiles),
    "llava_onevision": VisionFamily(
        required=("pixel_values", "image_sizes"), optional=("batch_num_images",), num_tokens=_tiled, cut=_cut_tiles
    ),
    **dict.fromkeys(("idefics3", "smolvlm"), _TILES),
    "internvl": VisionFamily(required=("pixel_values",), num_tokens=_shuffled),
    "mistral3": VisionFamily(required=("pixel_values", "image_sizes"), num_tokens=_merged_sizes, cut=_cut_pixels),
    "lfm2_vl": VisionFamily(
        required=("pixel_values", "spatial_shapes", "pixel_attention_mask"), num_tokens=_unshuffled, cut=_cut_patches
    ),
    "gemma3": VisionFamily(
        required=("pixel_values",),
        num_tokens=_gemma3,
        token_types="token_type_ids",
        inside="it attends in both directions inside an image",
    ),
}
