"""The image columns of a token-level dataset: what a row's media add to it, and the images themselves, not copied."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from dpofast.data.arrow import cache_options, chunk_bounds, read_chunks
from dpofast.data.formats import image_column
from dpofast.data.images.columns import IMAGE_KEYS, IMAGE_TOKEN_ID, IMAGE_TOKENS, IMAGES
from dpofast.data.images.stored import stored_images

PLACE = "_place"  # of a row in the dataset that it was made from
_ROWS = 1024
_STRETCHES = 1000  # of a mapped table that another one is joined of


def media_columns(media: Any) -> dict[str, Any]:
    """The values of a row's OF_IMAGES, from its PromptMedia or None."""
    if media is None:
        return {IMAGE_KEYS: [], IMAGE_TOKENS: []}
    return {
        IMAGE_KEYS: [image.key for image in media.images],
        IMAGE_TOKENS: [image.num_tokens for image in media.images],
        IMAGE_TOKEN_ID: media.token_id,
    }


def with_stored_images(dataset: Dataset) -> Dataset:
    """The dataset with its images as `images` in the form STORED; nothing is decoded or copied."""
    column = image_column(dataset.column_names)
    if column is None:
        return dataset
    images, rest = stored_images(dataset), dataset.remove_columns([column])
    if not rest.column_names:
        return images
    if rest._indices is not None:  # scattered rows are put in order, and not beside the user's own files
        rest = rest.flatten_indices(**cache_options(rest, "in order"))
    return concatenate_datasets([rest, images], axis=1)


def files_digest(dataset: Dataset) -> str:
    """A hash of the stamps of the image files that a dataset with STORED images names: a changed file changes it."""
    digest = hashlib.sha256()
    for table in read_chunks(dataset, [IMAGES], chunk_bounds(len(dataset), _ROWS)):
        for path in _paths(table.column(IMAGES)):
            try:
                found = os.stat(path)
                stamp = f"{found.st_size} {found.st_mtime_ns}"
            except OSError as error:
                stamp = str(error.errno)
            digest.update(f"{path}\0{stamp}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _paths(images: pa.ChunkedArray) -> Iterator[str]:
    """The paths of images without bytes, which are not read."""
    for chunk in filter(len, images.chunks):
        start, stop = chunk.offsets[0].as_py(), chunk.offsets[-1].as_py()
        structs = chunk.values.slice(start, stop - start)  # flatten() would copy where a row is null
        yield from structs.field("path").filter(structs.field("bytes").is_null()).drop_null().to_pylist()


def with_images(tokens: Dataset, source: Dataset) -> Dataset:
    """Tokens with a column PLACE, which is left out, beside the STORED images of these rows of their source.

    Images are not copied where the rows are few stretches of the source's, as without a few bad ones.
    """
    places = np.asarray(tokens.data.table.column(PLACE))
    images = source.select_columns([IMAGES])
    ends = np.flatnonzero(np.diff(places) != 1) + 1
    if len(ends) < _STRETCHES:
        stretches = ((int(rows[0]), int(rows[-1]) + 1) for rows in np.split(places, ends))
        images = concatenate_datasets([images.select(range(*bounds)) for bounds in stretches])
    else:
        images = stored_images(images.select(places))
    return concatenate_datasets([tokens.remove_columns([PLACE]), images], axis=1)
