"""Prompts with images of different sizes, as the processor of each family would make them; all by hand."""

import random
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from transformers import LlavaNextProcessor, LlavaOnevisionProcessor

from dpofast import pack, vision_inputs
from tests.support.vision_models import BREAK, END, IMAGE, START

# Of three images: rows and columns of the family's smallest unit.
SIZES = ((2, 2), (2, 3), (1, 4))


@dataclass
class Prompt:
    """Token ids with placeholders, and the processor's output for the images.

    Attributes:
        ids: with placeholders.
        processed: tensors by name; {} without images.
        patches: rows that the vision tower's first layer sees for them.
        branches: responses.
        key: the images.
    """

    ids: list
    processed: dict
    patches: int = 0
    branches: list = field(default_factory=list)
    key: tuple = ()

    def example(self, media):
        """A group for pack(): each branch is in a pair with the next."""
        pairs = [[k, k + 1] for k in range(len(self.branches) - 1)]
        return {"prompt_ids": self.ids, "branches": self.branches, "pairs": pairs, "media": media}


def prompt(family, images, *, before=(5, 6), between=(7,), after=(8, 9)):
    """A prompt with these images, numbers of SIZES and of the draw of their pixels: (size, draw) each."""
    parts = [_IMAGES[family](size, draw, len(images)) for size, draw in images]
    ids = list(before)
    for place, part in enumerate(parts):
        ids += [*(between if place else ()), *part.ids]
    names = parts[0].tensors if parts else ()
    processed = {name: _joined([part.tensors[name] for part in parts]) for name in names}
    if family in ("idefics3", "smolvlm"):
        processed = {name: tensor[None] for name, tensor in processed.items()}
    if family == "llava_onevision" and parts:
        processed["batch_num_images"] = torch.tensor([len(parts)])
    return Prompt([*ids, *after], processed, sum(part.patches for part in parts), key=tuple(images))


@dataclass
class _Part:
    ids: list
    tensors: dict
    patches: int


def _pixels(draw, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(draw))


def _joined(parts):
    """As processors do: stacked, padded with zeros to the largest."""
    sizes = [max(part.shape[axis] for part in parts) for axis in range(1, parts[0].ndim)]
    whole = torch.zeros(sum(len(part) for part in parts), *sizes, dtype=parts[0].dtype)
    start = 0
    for part in parts:
        place = (slice(start, start + len(part)), *(slice(0, size) for size in part.shape[1:]))
        whole[place] = part
        start += len(part)
    return whole


def _grid(size, draw, count):
    rows, columns = SIZES[size]
    grid = torch.tensor([[1, 2 * rows, 2 * columns]])
    tensors = {"pixel_values": _pixels(draw, 4 * rows * columns, 3 * 2 * 16), "image_grid_thw": grid}
    return _Part([START, *[IMAGE] * (rows * columns), END], tensors, 4 * rows * columns)


def _fixed(tokens, side=8):
    def image(size, draw, count):
        return _Part([IMAGE] * tokens, {"pixel_values": _pixels(draw, 1, 3, side, side)}, 1)

    return image


def _sized(unit):
    """Pixtral: a row of placeholders ends with a break, the last one with an end."""

    def image(size, draw, count):
        rows, columns = SIZES[size]
        ids = [token for _ in range(rows) for token in [*[IMAGE] * columns, BREAK]]
        tensors = {
            "pixel_values": _pixels(draw, 1, 3, rows * unit, columns * unit),
            "image_sizes": torch.tensor([[rows * unit, columns * unit]]),
        }
        return _Part([*ids[:-1], END], tensors, 1)

    return image


_IMAGE_SIZES = ((10, 20), (16, 16), (25, 9))
_TILES = (3, 5, 3)  # with the whole image: by the pinpoints (8, 16), (16, 8) and (16, 16) of tiles of 8


def _anyres(processor, **settings):
    def image(size, draw, count):
        cut = processor is LlavaNextProcessor or count == 1
        height, width = _IMAGE_SIZES[size]
        own = SimpleNamespace(
            image_processor=SimpleNamespace(image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]]),
            patch_size=4,
            num_additional_image_tokens=0,
            num_image_tokens=4,
            **settings,
        )
        own._get_unpadded_features = lambda *args: processor._get_unpadded_features(own, *args)
        tokens = processor._get_number_of_features(own, height, width, 8, 8) if cut else 4 + 1
        tiles = _TILES[size] if cut else 1
        tensors = {
            "pixel_values": _pixels(draw, 1, tiles, 3, 8, 8),
            "image_sizes": torch.tensor([[height, width]]),
        }
        return _Part([IMAGE] * tokens, tensors, tiles)

    return image


def _tiled(tokens, marked):
    """One, two or three tiles of one size, with a mark before each where the family has them."""

    def image(size, draw, count):
        tiles = size + 1
        ids = [token for tile in range(tiles) for token in [*([BREAK + tile] if marked else []), *[IMAGE] * tokens]]
        return _Part([START, *ids, END], {"pixel_values": _pixels(draw, tiles, 3, 16, 16)}, tiles)

    return image


def _lfm2(size, draw, count):
    """Of the second image two tiles, with marks."""
    shapes = [SIZES[size]] if size != 1 else [SIZES[size], SIZES[0]]
    ids, pixels, masks = [START], [], []
    for tile, (rows, columns) in enumerate(shapes):
        patches = 4 * rows * columns
        ids += [*([BREAK + tile] if len(shapes) > 1 else []), *[IMAGE] * (rows * columns)]
        pixels.append(_pixels(draw + 100 * tile, 1, patches, 48))
        masks.append(torch.ones(1, patches, dtype=torch.int32))
    tensors = {
        "pixel_values": _joined(pixels),
        "spatial_shapes": 2 * torch.tensor(shapes),
        "pixel_attention_mask": _joined(masks),
    }
    return _Part([*ids, END], tensors, len(shapes))


_IMAGES = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), _grid),
    **dict.fromkeys(("glm4v", "glm4v_moe", "glm46v"), _grid),
    "llava": _fixed(4),
    "llava_siglip": _fixed(4),
    "pixtral": _sized(4),
    "llava_next": _anyres(LlavaNextProcessor),
    "llava_onevision": _anyres(LlavaOnevisionProcessor, vision_aspect_ratio="anyres_max_9"),
    **dict.fromkeys(("idefics3", "smolvlm"), _tiled(4, True)),
    "internvl": _tiled(4, False),
    "mistral3": _sized(8),
    "lfm2_vl": _lfm2,
    "gemma3": _fixed(4),
}


def with_branches(prompts, branches, seed=0):
    """Give each prompt so many random responses of text, of 1 to 5 tokens, that differ."""
    draw = random.Random(seed)
    for one, count in zip(prompts, branches, strict=True):
        one.branches = [[3 + k, *(draw.randrange(3, 80) for _ in range(draw.randint(0, 4)))] for k in range(count)]
    return prompts


def sequences(prompts):
    """(prompt, response) of a packed batch's sequences: in order of first appearance, equal ones once."""
    first = {}
    for one in prompts:
        group = first.setdefault((tuple(one.ids), one.key), (one, {}))
        group[1].update({tuple(response): None for response in one.branches})
    return [(one, list(response)) for one, responses in first.values() for response in responses]


def alone(model, family, prompts_and_responses):
    """(N,) log-probs of responses by the model's own forward, each sequence alone with its own processor's output."""
    parts = []
    for one, response in prompts_and_responses:
        ids = torch.tensor([[*one.ids, *response]])
        inputs = {name: tensor.clone() for name, tensor in one.processed.items()}
        kinds = {"gemma3": "token_type_ids"}.get(family, "mm_token_type_ids" if _IMAGES[family] is _grid else None)
        if kinds and inputs:
            inputs[kinds] = (ids == IMAGE).long()
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **inputs).logits
        scored = logits[0, len(one.ids) - 1 : -1].log_softmax(-1)
        parts.append(scored.gather(1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(parts)


def mixed_prompts(family):
    """No image, one and three, of different sizes; equal text with another image; an equal prompt again."""
    three = [(0, 2), (1, 3), (2, 4)]
    prompts = [prompt(family, images) for images in ([], [(0, 1)], three, [(0, 5)], [(0, 1)], [(2, 6)])]
    return with_branches(prompts, (2, 3, 4, 2, 2, 5))


def packed(model, prompts, **options):
    """The batches that pack() makes of prompts for a model."""
    inputs = vision_inputs(model)
    return pack([one.example(inputs.of_prompt(one.ids, one.processed)) for one in prompts], **options)
