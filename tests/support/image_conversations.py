"""Conversations about pictures, as rows of a dataset, and what tokenize_preferences makes of them."""

import io

import datasets
import pytest
from datasets import Dataset, Features, List, Value

from dpofast import DataError, tokenize_preferences, vision_inputs
from dpofast.data.images.prompt_images import PromptImages
from tests.support.vision_models import vision_model
from tests.support.vision_processors import CHARACTERS, FIRST, processor_of

TURNS = [{"role": Value("string"), "content": Value("string")}]


def images_of(family):
    return PromptImages(processor_of(family), vision_inputs(vision_model(family)))


LLAVA = images_of("llava")


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def conversation(pictures, question="what is it?", better="a cat", worse="a dog"):
    return {
        "images": pictures,
        "prompt": [user(question)],
        "chosen": [assistant(better)],
        "rejected": [assistant(worse)],
    }


def dataset_of(rows):
    features = {"images": List(datasets.Image()), **dict.fromkeys(("prompt", "chosen", "rejected"), TURNS)}
    return Dataset.from_list(rows, features=Features(features))


def tokens_of(rows, images=LLAVA, **options):
    data = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    return tokenize_preferences(data, None, images=images, **options)


def refused(rows, images=LLAVA, **options):
    with pytest.raises(DataError) as raised:
        tokens_of(rows, images, **options)
    return str(raised.value)


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def ids(text):
    return [FIRST + CHARACTERS.index(character) for character in text]
