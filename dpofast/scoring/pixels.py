"""pixel_groups: rows of a token-level dataset with images, a few at a time with what the processor makes of the images.

Pixels take far more memory than token ids: 18 KB a token for Qwen-VL, so 11 MB for an image of 600 tokens. Rows with
equal images stand in one group, so that these are processed once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor

from dpofast.data.arrow import mapped_files, release_pages
from dpofast.data.images.columns import IMAGE_KEYS, IMAGES, OF_IMAGES, has_images
from dpofast.data.images.prompt_images import PromptImages
from dpofast.data.token_rows import PROMPT, prompts_of

# Pixels of a group, unless one prompt has more.
PIXEL_BYTES = 1 << 28
MEDIA = "media"  # of an example, as `pack` reads it
# What PromptImages.media reads of a row.
STORED_COLUMNS = (IMAGES, *OF_IMAGES, "row")


class PixelGroup(NamedTuple):
    """Rows that are packed together.

    Attributes:
        rows: (k,) int64, their places among all that were given.
        examples: these rows with media, in a form that `pack` takes.
    """

    rows: Tensor
    examples: Any

    def renamed(self, error: ValueError) -> ValueError:
        """An error of `pack` about these examples, naming the places of all."""
        return ValueError(re.sub(r"examples\[(\d+)\]", lambda found: f"examples[{self._place(found[1])}]", str(error)))

    def _place(self, index: str) -> int:
        return int(self.rows[int(index)])


def needs_pixels(examples: Any) -> bool:
    """Whether examples are rows of a token-level dataset with images: it, an Arrow table, or mappings without media."""
    if isinstance(examples, (Dataset, pa.Table)):
        return has_images(examples.column_names)
    return isinstance(examples, list) and any(
        isinstance(row, Mapping) and row.get(IMAGE_KEYS) is not None and row.get(MEDIA) is None for row in examples
    )


def pixel_groups(examples: Dataset | pa.Table | list[Mapping[str, Any]], images: PromptImages) -> Iterator[PixelGroup]:
    """Divide rows into groups whose pixels take at most PIXEL_BYTES, and make these pixels when a group is asked for.

    Args:
        examples: with the columns that `pack` takes and STORED_COLUMNS; mappings may have media in their place. The
            encoded images of a Dataset are read one row at a time.
        images: makes the pixels.

    Raises:
        ValueError: while iterating, an image that can no longer be read or is another one, or that is missing.
    """
    source: Any = examples
    if isinstance(examples, Dataset):
        names = examples.column_names
        source = examples.with_format(None).select_columns([name for name in STORED_COLUMNS if name in names])
        examples = examples.select_columns([name for name in names if name != IMAGES]).with_format("arrow")[:]
    places: dict[tuple[bytes, ...], list[int]] = {}
    for place, keys in enumerate(_keys(examples)):
        places.setdefault(keys, []).append(place)
    rows, media, size = list[int](), list[Any](), 0
    files = mapped_files(source) if isinstance(source, Dataset) else ()
    for keys, own in places.items():
        made = _media(source, own[0], images) if keys else None
        more = pixel_bytes(made)
        if rows and size + more > PIXEL_BYTES:
            release_pages(files)
            yield _group(examples, rows, media)
            rows, media, size = [], [], 0
        rows += own
        media += [made] * len(own)
        size += more
    if rows:
        release_pages(files)
        yield _group(examples, rows, media)


def pixel_bytes(media: Any) -> int:
    """Bytes of the tensors of a PromptMedia; 0 for None."""
    images = () if media is None else media.images
    return sum(tensor.nbytes for image in images for tensor in image.tensors.values())


def _keys(examples: pa.Table | list[Mapping[str, Any]]) -> Iterator[tuple[bytes, ...]]:
    """Of each row, the keys of its images."""
    if isinstance(examples, pa.Table):
        yield from (tuple(keys or ()) for keys in examples.column(IMAGE_KEYS).to_pylist())
        return
    for row in examples:
        media = row.get(MEDIA)
        yield tuple(row.get(IMAGE_KEYS) or ()) if media is None else tuple(image.key for image in media.images)


def _media(source: Any, place: int, images: PromptImages) -> Any:
    """The media of a row of a Dataset with STORED_COLUMNS, of a table or of mappings."""
    if isinstance(source, pa.Table):
        names = [name for name in STORED_COLUMNS if name in source.column_names]
        row: Mapping[str, Any] = {name: source.column(name)[place].as_py() for name in names}
    else:
        row = source[place]
    media = images.media(row) if row.get(MEDIA) is None else row[MEDIA]
    if media is None:
        raise ValueError(f"examples[{place}]: {IMAGES}: expected the images of {IMAGE_KEYS} beside them, got none")
    return media


def _group(examples: pa.Table | list[Mapping[str, Any]], rows: Sequence[int], media: Sequence[Any]) -> PixelGroup:
    places = torch.tensor(rows)
    if not isinstance(examples, pa.Table):
        return PixelGroup(places, [{**examples[row], MEDIA: one} for row, one in zip(rows, media, strict=True)])
    names = [name for name in examples.column_names if name not in STORED_COLUMNS]
    table = examples.select(names).take(pa.array(rows))
    values, offsets, _ = prompts_of(table)
    columns = {name: table.column(name) for name in names}
    return PixelGroup(places, {**columns, PROMPT: (values, offsets), MEDIA: list(media)})
