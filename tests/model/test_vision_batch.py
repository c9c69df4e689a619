"""vision_inputs(model).of_batch: one call of a processor for several prompts has the images of calls for each."""

import copy

import pytest
import torch

from dpofast import vision_inputs
from tests.support.vision_models import vision_model
from tests.support.vision_processors import FAMILIES, picture, processor_of, template_of

# Not padded to the largest of the call, or to the most images of a prompt; first and last are the same
PICTURES = (
    [picture(0, 20, 30)],
    [],
    [picture(1, 33, 9), picture(2, 16, 16)],
    [picture(0, 20, 30)],
)


def processed(family, counts):
    """The processor's output for prompts with the first images of each of PICTURES, and their rows without padding."""
    processor = processor_of(family)
    texts = [
        processor.apply_chat_template(
            [
                {
                    "role": "user",
                    "content": [*({"type": "image"} for _ in images), {"type": "text", "text": f"why {n}?"}],
                }
            ],
            chat_template=template_of(family),
            tokenize=False,
        )
        for n, images in enumerate(counts)
    ]
    images = [list(images) for images in counts]
    output = processor(
        text=texts, images=images if any(images) else None, padding=True, return_tensors="pt", add_special_tokens=False
    )
    kept = output["attention_mask"] != 0
    return [ids[mask] for ids, mask in zip(output["input_ids"], kept, strict=True)], output


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_has_the_images_of_its_prompts(family):
    inputs = vision_inputs(vision_model(family))
    of_rows = PICTURES if family != "gemma3" else PICTURES[:1] + PICTURES[2:]
    media = inputs.of_batch(*processed(family, of_rows))
    assert len(media) == len(of_rows)
    for one, images in zip(media, of_rows, strict=True):
        rows, output = processed(family, [images])
        alone = inputs.of_prompt(rows[0], output)
        assert (one is None) == (alone is None) == (not images)
        if one is not None:
            assert [image.num_tokens for image in one.images] == [image.num_tokens for image in alone.images]
            for image, other in zip(one.images, alone.images, strict=True):
                assert image.key == other.key
                assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in image.tensors.items())
    assert media[0].images[0] is media[-1].images[0]


@pytest.mark.parametrize("family", ["qwen2_vl", "llava", "llava_next", "idefics3", "internvl"])
def test_rows_that_are_cut_inside_an_image_are_refused(family):
    inputs = vision_inputs(vision_model(family))
    rows, output = processed(family, PICTURES)
    places = [(row == inputs.token_id).nonzero().flatten().tolist() for row in rows]
    for at in (0, 2, 3):
        cut = copy.copy(rows)
        cut[at] = rows[at][: places[at][-1]]
        with pytest.raises(
            ValueError, match=r"input_ids\[\d\]: expected \d+ image placeholders .*, got \d+: take token"
        ):
            inputs.of_batch(cut, output)
    stray = [*rows[:1], torch.tensor([5, inputs.token_id]), *rows[2:]]
    with pytest.raises(ValueError, match="image placeholders"):
        inputs.of_batch(stray, output)
    with pytest.raises(
        ValueError, match=r"input_ids\[0\]: expected an image for \d+ image placeholders .*got no pixel"
    ):
        inputs.of_batch(rows, {})


def test_prompts_and_pixels_of_different_calls_are_refused():
    inputs = vision_inputs(vision_model("idefics3"))
    rows, output = processed("idefics3", PICTURES)
    with pytest.raises(ValueError, match=r"output for 3 prompts, pixel_values of shape \(3, images, ...\), got \(4"):
        inputs.of_batch(rows[:3], output)
