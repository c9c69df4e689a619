"""What transformers' own image processors return for pictures of different sizes, through pack() and the models."""

import copy

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from dpofast import attach_logprob_head, pack, vision_inputs
from tests.support.vision_models import IMAGE, vision_model

_TILE = {"height": 8, "width": 8}
_PINPOINTS = {"image_grid_pinpoints": [[8, 16], [16, 8], [16, 16]]}
_SPLIT = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
# Family: (its image processor, settings for the tiny model)
_PROCESSORS = {
    "qwen2_vl": ("Qwen2VL", {"patch_size": 4, "min_pixels": 64, "max_pixels": 512}),
    "qwen3_vl": ("Qwen2VL", {"patch_size": 4, "min_pixels": 64, "max_pixels": 512}),
    "glm4v": ("Glm4v", {"patch_size": 4, "size": {"shortest_edge": 128, "longest_edge": 1024}}),
    "llava": ("CLIP", {"size": {"shortest_edge": 8}, "crop_size": _TILE}),
    "llava_next": ("LlavaNext", {"size": {"shortest_edge": 8}, "crop_size": _TILE, **_PINPOINTS}),
    "llava_onevision": ("LlavaOnevision", {"size": _TILE, **_PINPOINTS}),
    "idefics3": ("Idefics3", _SPLIT),
    "smolvlm": ("SmolVLM", _SPLIT),
    "internvl": ("GotOcr2", {"size": {"height": 16, "width": 16}, "crop_to_patches": True, "max_patches": 3}),
    "pixtral": ("Pixtral", {"size": {"longest_edge": 32}, "patch_size": {"height": 4, "width": 4}}),
    "mistral3": ("Pixtral", {"size": {"longest_edge": 32}, "patch_size": {"height": 8, "width": 8}}),
    "gemma3": ("Gemma3", {"size": _TILE}),
}


def picture(seed, height, width):
    """A picture of random colours."""
    pixels = np.random.RandomState(seed).randint(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def processor_of(family):
    """The family's image processor that needs no torchvision."""
    name, settings = _PROCESSORS[family]
    found = (getattr(transformers, f"{name}ImageProcessor{kind}", None) for kind in ("Pil", ""))
    return next(cls for cls in found if cls is not None)(**settings)


@pytest.mark.parametrize("family", _PROCESSORS)
def test_their_output_is_divided_as_the_model_counts_it(family):
    """The model's own forward refuses another number of placeholders than features."""
    model = vision_model(family)
    plain = copy.deepcopy(model)
    attach_logprob_head(model, padded=family == "gemma3")
    inputs, processor = vision_inputs(model), processor_of(family)
    wide, tall, square = picture(0, 20, 30), picture(1, 33, 9), picture(2, 16, 16)
    examples, truth = [], []
    for pictures in ([wide], [tall, square, wide], [square]):
        processed = dict(processor(images=[pictures], return_tensors="pt"))
        names = {*inputs.family.required, *inputs.family.optional} & processed.keys()
        seen = {name: processed[name] for name in names}
        counts = plain.model.get_image_features(**seen, return_dict=True).pooler_output
        total = sum(part.shape[0] if part.ndim == 2 else part.shape[0] * part.shape[1] for part in counts)
        # a token between placeholders, where positions count images apart
        of_images = [image.tolist() for image in _divided(inputs, processed, total)]
        ids = [5, *(token for part in of_images for token in [*part, 7]), 8]
        media = inputs.of_prompt(ids, processed)
        examples.append({"prompt_ids": ids, "chosen_ids": [9, 10], "rejected_ids": [11], "media": media})
        for response in ([9, 10], [11]):
            row = torch.tensor([[*ids, *response]])
            taken = dict(seen)
            if inputs.family.token_types:
                taken[inputs.family.token_types] = (row == IMAGE).long()
            logits = plain(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False, **taken).logits
            scored = logits[0, len(ids) - 1 : -1].log_softmax(-1)
            truth.append(scored.gather(1, torch.tensor(response)[:, None])[:, 0])
    (batch,) = pack(examples)
    with torch.no_grad():
        torch.testing.assert_close(model(packed=batch).logps, torch.cat(truth), atol=1e-5, rtol=0)


def _divided(inputs, processed, total):
    """The placeholders of each image, which together are as many as the model has features."""
    tensors = {name: tensor[0] if inputs.family.nested else tensor for name, tensor in processed.items()}
    if "batch_num_images" in tensors:
        tensors["batch_num_images"] = tensors["batch_num_images"].repeat_interleave(tensors["batch_num_images"])
    tokens = inputs.family.num_tokens(inputs.config, tensors)
    assert sum(tokens) == total
    return [torch.full((count,), IMAGE) for count in tokens]
