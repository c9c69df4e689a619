"""Pixels of a step's images, made where its examples are read: in a loader's worker, or in the thread one step ahead.

They live as long as the step's examples, so at most those of two steps are in memory.
"""

from __future__ import annotations

from typing import Any

from dpofast.data.images.columns import IMAGE_KEYS, IMAGES, OF_IMAGES
from dpofast.data.images.prompt_images import PromptImages
from dpofast.scoring.pixels import MEDIA

_MADE_OF = (IMAGES, *OF_IMAGES)


def with_media(examples: list[Any], images: PromptImages | None) -> None:
    """Put the pixels of a step's images into its examples, in place of the encoded images; each prompt's images once.

    Args:
        examples: rows of a token-level dataset; those without columns of images stay as they are.
        images: makes the pixels.

    Raises:
        ValueError: naming the row: an image that cannot be read any more, or is another one than was tokenized; rows
            with images where nothing makes their pixels.
    """
    made: dict[tuple[bytes, ...], Any] = {}
    for place, example in enumerate(examples):
        if IMAGE_KEYS not in example:
            continue
        given = example[IMAGE_KEYS]
        keys = () if given is None else tuple(map(bytes, given))
        if keys and keys not in made:
            if images is None:
                raise ValueError(f"row {example.get('row')}: expected a processor for its images, got none")
            made[keys] = images.media(example)
        text = {name: value for name, value in example.items() if name not in _MADE_OF}
        examples[place] = {**text, MEDIA: made.get(keys)}


def without_media(examples: list[Any]) -> list[Any]:
    """The examples without pixels: what may be kept of them after their step."""
    return [{name: value for name, value in each.items() if name != MEDIA} for each in examples]
