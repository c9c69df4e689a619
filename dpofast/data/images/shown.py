"""Token ids of a prompt with images as text: one mark in place of an image's placeholders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dpofast.data.images.columns import IMAGE_TOKEN_ID, IMAGE_TOKENS, IMAGES


def text_of_prompt(
    row: Mapping[str, Any],
    ids: Sequence[int],
    decode: Callable[[list[int]], str],
    mark: Callable[[int, int], str] | None = None,
) -> str:
    """Return the text of a prompt's token ids. What stands between an image's placeholders is part of the image.

    Args:
        row: of a token-level dataset; without images of its own the text is decode(ids).
        ids: its prompt's.
        decode: the text of the ids between images.
        mark: (number of an image from 0, its placeholders) -> what stands for it; None: [image]. Where the vision tower
            sees tiles, an image here is a tile, and [tile] stands for it.
    """
    numbers = [int(token) for token in ids]
    counts = row.get(IMAGE_TOKENS)
    if counts is None or not len(counts):
        return decode(numbers)
    plain = "[image]" if len(counts) == len(row[IMAGES]) else "[tile]"
    places = np.flatnonzero(np.asarray(numbers) == int(row[IMAGE_TOKEN_ID]))
    text, start, seen = "", 0, 0
    for image, count in enumerate(map(int, counts)):
        first, last = places[seen], places[seen + count - 1]
        text += decode(numbers[start:first]) + (plain if mark is None else mark(image, count))
        start, seen = last + 1, seen + count
    return text + decode(numbers[start:])
