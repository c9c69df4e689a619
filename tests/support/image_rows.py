"""Token-level datasets with images, made by hand with a family's whole processor."""

import contextlib
import io

import pyarrow as pa
from datasets import Dataset, Features, List, Value

from dpofast import vision_inputs
from dpofast.data.images.columns import FEATURES, IMAGE_KEYS, IMAGE_TOKEN_ID, IMAGE_TOKENS, IMAGES, STORED
from dpofast.data.images.prompt_images import PromptImages
from tests.support.vision_models import vision_model
from tests.support.vision_processors import picture, processor_of

IDS = List(Value("int32"))
PAIR = {"prompt_ids": IDS, "chosen_ids": IDS, "rejected_ids": IDS}
LIST = {"prompt_ids": IDS, "responses_ids": List(IDS), "ranks": IDS, "order": IDS}


def prompt_images(family):
    """The family's processor for its tiny model."""
    return PromptImages(processor_of(family), vision_inputs(vision_model(family)))


def png(seed, height=8, width=8):
    """A picture of random colours, as a file's bytes."""
    file = io.BytesIO()
    picture(seed, height, width).save(file, "PNG")
    return file.getvalue()


@contextlib.contextmanager
def arrow_pool():
    """A memory pool that counts what Arrow allocates inside."""
    former = pa.default_memory_pool()
    pa.set_memory_pool(pool := pa.proxy_memory_pool(former))
    try:
        yield pool
    finally:
        pa.set_memory_pool(former)


def row_of(images, text, files, responses, number):
    """A pair of two responses (text), or a list of more, to a prompt with these images (bytes)."""
    tokenizer = images.tokenizer
    row = dict.fromkeys((IMAGES, IMAGE_KEYS, IMAGE_TOKENS, IMAGE_TOKEN_ID))
    if files:
        # Qwen2-VL's own positions take images without text between them for one
        ids, media = images.encode(f"{images.token}, " * len(files) + text, files)
        row = {
            IMAGES: [{"bytes": file, "path": None} for file in files],
            IMAGE_KEYS: [image.key for image in media.images],
            IMAGE_TOKENS: [image.num_tokens for image in media.images],
            IMAGE_TOKEN_ID: media.token_id,
        }
    else:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    of_responses = [tokenizer(each, add_special_tokens=False)["input_ids"] for each in responses]
    if len(responses) == 2:
        names = dict(zip(("chosen_ids", "rejected_ids"), of_responses, strict=True))
    else:
        places = list(range(len(responses)))
        names = {"responses_ids": of_responses, "ranks": places, "order": places}
    return {"prompt_ids": ids, **names, **row, "row": number}


def image_dataset(images, rows):
    """A token-level dataset of rows (text, files, responses); all pairs, or all lists."""
    made = [row_of(images, *row, number) for number, row in enumerate(rows)]
    columns = PAIR if "chosen_ids" in made[0] else LIST
    features = {**columns, IMAGES: STORED, **FEATURES, "row": Value("int64")}
    return Dataset.from_list(made, features=Features(features))


def mixed_rows(lists=False):
    """Prompts without images, with one and with several; images that several rows share, and text that several do."""
    one, other, third = png(1), png(2, 12, 8), png(3, 8, 16)
    prompts = [
        ("what is it?", [one]),
        ("why?", []),
        ("what is it?", [other]),
        ("which of them?", [one, other, third]),
        ("what is it?", [one]),
        ("and what is it?", [one]),
        ("which of them?", [one, third, other]),
        ("why?", [third]),
    ]
    responses = ["a cat", "a dog.", "it is a cat, i think", "no", "two of them", "a dog"]
    count = 3 if lists else 2
    return [(*prompt, [responses[(k + j) % 6] for j in range(count)]) for k, prompt in enumerate(prompts)]
