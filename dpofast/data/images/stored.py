"""Images of rows in their stored form, {"bytes", "path"}: encoded as they are given, or where their file is.

Of a dataset, stored_images makes the column `images` without decoding one, and without copying pixels where bytes are
stored already: the Arrow arrays of bytes are used again. decode.opened is the way back.
"""

from __future__ import annotations

import io
import os
from collections.abc import Collection
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features
from PIL import Image

from dpofast.data.formats import BadRow, DataError
from dpofast.data.images.columns import IMAGES, ROW_IMAGES, STORED
from dpofast.data.images.decode import is_relative, opened, source_of

_FEATURES = Features({IMAGES: STORED})
_LIST = _FEATURES.arrow_schema.field(IMAGES).type
_STRUCT = _LIST.value_type
_GREY = ("1", "L", "LA", "I;16")
_GATHERED = 16  # rows whose images are in memory at a time while scattered rows are written in order


def images_of(value: Any) -> list[Any]:
    """Return what a row holds in `images` or `image` as a list: of one image, of several, or, for null, of none."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def image_column(columns: Collection[str]) -> str | None:
    """Return which column holds the images, None where none does. Raises BadRow where both names are there."""
    found = [column for column in ROW_IMAGES if column in columns]
    if len(found) > 1:
        raise BadRow("both 'images' and 'image' are there", "only one can hold the images: remove the other")
    return found[0] if found else None


def stored(value: Any, folder: str | os.PathLike[str] = "") -> list[dict[str, Any]]:
    """Return the images of a row as {"bytes", "path"}, one of which is null.

    Args:
        value: an image in any form that decode.opened takes, a list of them, or None.
        folder: what relative paths are relative to; "": the working folder. They are stored as absolute paths.

    Raises:
        BadRow: a value is of a wrong type, or a PIL image cannot be read.
    """
    return [_stored(image, folder) for image in images_of(value)]


def _stored(image: Any, folder: str | os.PathLike[str]) -> dict[str, Any]:
    source = source_of(image)
    if isinstance(source, Image.Image):
        path = _path_of_unread(source)
        return {"bytes": _as_png(source) if path is None else None, "path": path}
    if isinstance(source, bytes):
        return {"bytes": source, "path": image.get("path") if isinstance(image, dict) else None}
    return {"bytes": None, "path": os.path.join(os.path.abspath(folder), source)}


def _path_of_unread(picture: Image.Image) -> str | None:
    """The file of a picture whose pixels PIL has not read yet, so that they are still those of the file."""
    path = getattr(picture, "filename", "")
    is_unread = bool(getattr(picture, "tile", ())) and not getattr(picture, "decoderconfig", ())
    return os.path.abspath(path) if is_unread and isinstance(path, str) and os.path.isfile(path) else None


def _as_png(picture: Image.Image) -> bytes:
    """A picture as PNG, which opens as the same pixels in RGB."""
    pixels, buffer = opened(picture), io.BytesIO()
    if picture.mode in _GREY:
        pixels = pixels.getchannel("R")
    pixels.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


# ---- in Arrow -------------------------------------------------------------------------------------------------------


def stored_images(dataset: Dataset) -> Dataset:
    """Return a dataset with one column `images` (columns.STORED), the images of a dataset's rows in their order.

    The column may hold lists or single images: datasets' Image feature with or without decoding, structs of bytes or
    path, strings (paths) or bytes. A row of null has null or []. Relative paths are made absolute from the working
    folder. Rows that are scattered (of shuffle or select) are written to datasets' cache in their order.

    Raises:
        DataError: there is no such column, or it is of another type.
        BadRow: there are two.
    """
    column = image_column(dataset.column_names)
    if column is None:
        raise DataError(f"expected a column 'images' or 'image', got {', '.join(dataset.column_names) or 'none'}")
    rows = dataset.select_columns([column]).with_format("arrow")
    if rows._indices is not None:
        rows = rows.map(batched=True, batch_size=_GATHERED, writer_batch_size=_GATHERED, desc="Images in order")
    data = rows.data
    given = data.column(column).chunks
    chunks = [_lists(column, chunk) for chunk in given]
    if column == IMAGES and all(new is old for new, old in zip(chunks, given, strict=True)):
        table: Any = data.cast(_FEATURES.arrow_schema)  # stays mapped, for processes that it is sent to
    else:
        table = pa.table({IMAGES: pa.chunked_array(chunks, type=_LIST)}, schema=_FEATURES.arrow_schema)
    return Dataset(table, info=DatasetInfo(features=_FEATURES), fingerprint=f"{rows._fingerprint}-images")


def _lists(column: str, array: pa.Array) -> pa.Array:
    """An array of a column of images as lists of {"bytes", "path"}; itself where it is that already."""
    kind = array.type
    if pa.types.is_null(kind):
        return pa.nulls(len(array), _LIST)
    if pa.types.is_fixed_size_list(kind):
        array, kind = array.cast(pa.list_(kind.value_type)), pa.list_(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        offsets, inner = array.offsets, array.values
        values = _structs(column, inner)
        if values is inner and kind == _LIST:
            return array
    else:
        offsets, values = pa.array(np.arange(len(array) + 1, dtype=np.int32)), _structs(column, array)
    # A sliced array's offsets begin inside their buffer, which from_arrays does not take beside a mask.
    starts = pa.array(offsets.to_numpy().astype(np.int32, copy=False))
    return pa.ListArray.from_arrays(starts, values, type=_LIST, mask=array.is_null())


def _structs(column: str, array: pa.Array) -> pa.Array:
    """An array of images, each null, a struct, a path or bytes, as structs of bytes and path."""
    kind, length = array.type, len(array)
    encoded, paths = pa.nulls(length, pa.binary()), pa.nulls(length, pa.string())
    if pa.types.is_struct(kind) and {field.name for field in kind} & {"bytes", "path"}:
        encoded = array.field("bytes") if kind.get_field_index("bytes") >= 0 else encoded
        paths = array.field("path") if kind.get_field_index("path") >= 0 else paths
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        paths = array
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        encoded = array
    elif not pa.types.is_null(kind):
        raise DataError(
            f"column '{column}' holds no images: expected datasets' Image feature, structs of bytes and path, paths or "
            f"bytes, got Arrow's type {kind}"
        )
    found = absolute(encoded, paths)
    if found is paths and kind == _STRUCT:
        return array
    try:
        parts = [encoded.cast(pa.binary()), found.cast(pa.string())]
    except pa.ArrowException as error:
        raise DataError(f"column '{column}': {error}") from None
    return pa.StructArray.from_arrays(parts, fields=list(_STRUCT), mask=array.is_null())


def absolute(encoded: pa.Array, paths: pa.Array, folder: str | os.PathLike[str] = "") -> pa.Array:
    """Return paths with `folder` before those that are relative and have no bytes beside them; itself if none is."""
    if not encoded.null_count or paths.null_count == len(paths):
        return paths
    given = paths.to_pylist()
    relative = [
        row
        for row, (path, has_bytes) in enumerate(zip(given, encoded.is_valid().to_pylist(), strict=True))
        if path is not None and not has_bytes and is_relative(path)
    ]
    if not relative:
        return paths
    for row in relative:
        given[row] = os.path.join(os.path.abspath(folder), given[row])
    return pa.array(given, paths.type)
