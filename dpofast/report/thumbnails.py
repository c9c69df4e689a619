"""Small pictures of the images of the pairs in report.html, in the page itself."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image

from dpofast.common.printable import printable
from dpofast.data.formats import ID_COLUMNS, BadRow
from dpofast.data.images.columns import IMAGE_KEYS, has_images
from dpofast.data.images.decode import opened

# Of one pair: at most so many pictures, none of more bytes. As text in the page they take at most 35 kB.
MOST_PICTURES, MOST_BYTES = 3, 8_000
_MOST_NAME = 60
# Longest edge in pixels and quality of a JPEG, tried in turn; the last is below MOST_BYTES whatever it shows.
_SIZES = ((160, 80), (160, 50), (112, 40), (48, 40))


def row_of(trainer: Any, example: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row of the held-out data that an evaluated example was made of: it has the images, which are not kept.

    Args:
        trainer: a DPOTrainer.
        example: of one of its PairRecords, with its index in the dataset.

    Returns:
        The row; without images the example itself.
    """
    last = getattr(trainer.callback_handler.eval_dataloader, "dataset", None)  # further data, or of several the last
    held_out = trainer.eval_dataset
    every = list(held_out.values()) if isinstance(held_out, dict) else [held_out]
    for dataset in (*every, getattr(last, "dataset", None)):
        if not isinstance(dataset, Dataset) or not has_images(dataset.column_names) or "index" not in example:
            continue
        if example["index"] < len(dataset):
            row = dataset.with_format(None)[int(example["index"])]
            compared = [name for name in (*ID_COLUMNS, IMAGE_KEYS) if name in row and name in example]
            if all(np.array_equal(row[name], example[name]) for name in compared):
                return row
    return example


def thumbnails_html(images: Sequence[Any] | None) -> str:
    """HTML of the first pictures of a prompt, and how many more there are; "" without images.

    Args:
        images: of a row of a token-level dataset. One that cannot be read any more is said to be so.
    """
    if not images:
        return ""
    parts = [_picture(image, f"image {i + 1} of {len(images)}") for i, image in enumerate(images[:MOST_PICTURES])]
    further = len(images) - MOST_PICTURES
    more = f"<span>and {further:,} more</span>" if further > 0 else ""
    return f'<div class="images">{"".join(parts)}{more}</div>'


def _picture(image: Any, name: str) -> str:
    path = image.get("path") if isinstance(image, dict) else None
    if path:
        file = printable(Path(str(path)).name)
        name += f": {file if len(file) <= _MOST_NAME else file[:_MOST_NAME] + '…'}"
    try:
        picture = opened(image)
    except BadRow:
        return f"<span>{html.escape(name)} (cannot be read any more)</span>"
    alt = html.escape(f"{name}, {picture.width} x {picture.height} pixels")
    data, (width, height) = small_jpeg(picture)
    source = base64.b64encode(data).decode()
    return f'<img alt="{alt}" title="{alt}" width="{width}" height="{height}" src="data:image/jpeg;base64,{source}">'


def small_jpeg(picture: Image.Image) -> tuple[bytes, tuple[int, int]]:
    """A JPEG of at most MOST_BYTES of a picture in RGB, whose longest edge is at most 160 pixels, and its size."""
    data = b""
    for edge, quality in _SIZES:
        small = picture.copy()
        small.thumbnail((edge, edge))
        file = io.BytesIO()
        small.save(file, "JPEG", quality=quality)
        data = file.getvalue()
        if len(data) <= MOST_BYTES:
            break
    return data, small.size
