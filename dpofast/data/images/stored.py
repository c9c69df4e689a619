"""Images of rows in their stored form, {"bytes", "path"}: encoded as they are given, or where their file is.

Of a dataset, stored_images makes the column `images` without decoding one, and without copying pixels where bytes are
stored already: the Arrow arrays of bytes are used again. decode.opened is the way back.
"""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features, IterableDataset, LargeList, List
from datasets import Image as ImageFeature
from datasets.fingerprint import Hasher
from PIL import Image

from dpofast.data.arrow import cache_options, mapped_files, release_pages
from dpofast.data.formats import BadRow, DataError, image_column, place
from dpofast.data.images.columns import IMAGES, ROW_IMAGES, STORED
from dpofast.data.images.decode import is_relative, opened, source_of

_FEATURES = Features({IMAGES: STORED})
_LIST = _FEATURES.arrow_schema.field(IMAGES).type
_STRUCT = _LIST.value_type
_GREY = ("1", "L", "LA", "I;16")
_GATHERED = 64  # rows whose images are in memory at a time while scattered rows are written in order


def images_of(value: Any) -> list[Any]:
    """Return what a row holds in `images` or `image` as a list: of one image, of several, or, for null, of none."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


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
    folder. Rows that are scattered (of shuffle or select) are copied into datasets' cache, a few at a time.

    Raises:
        DataError: there is no such column, or it is of another type.
        BadRow: there are two.
    """
    column = image_column(dataset.column_names)
    if column is None:
        raise DataError(f"expected a column 'images' or 'image', got {', '.join(dataset.column_names) or 'none'}")
    rows = dataset.select_columns([column]).with_format("arrow")
    if rows._indices is not None:
        read = _Gathered(files=mapped_files(rows))
        options = cache_options(rows, read)
        rows = rows.map(
            read, batched=True, batch_size=_GATHERED, writer_batch_size=_GATHERED, desc="Images in order", **options
        )
    data = rows.data
    given = data.column(column).chunks
    whole = [with_folder(chunk) for chunk in given]
    fingerprint = f"{rows._fingerprint}-images"
    if any(new is not old for new, old in zip(whole, given, strict=True)):  # other files in another working folder
        fingerprint += f"-{Hasher.hash(os.getcwd())}"
    chunks = [_lists(column, chunk) for chunk in whole]
    if column == IMAGES and all(new is old for new, old in zip(chunks, given, strict=True)):
        table: Any = data.cast(_FEATURES.arrow_schema)  # stays mapped, for processes that it is sent to
    else:
        table = pa.table({IMAGES: pa.chunked_array(chunks, type=_LIST)}, schema=_FEATURES.arrow_schema)
    return Dataset(table, info=DatasetInfo(features=_FEATURES), fingerprint=fingerprint)


def with_folder(array: pa.Array, folder: str | os.PathLike[str] = "") -> pa.Array:
    """Return an array of images with `folder` before relative paths that have no bytes beside them.

    Args:
        array: images or lists of them, as paths or structs; of another type it is returned as it is.
        folder: "": the working folder.

    Returns:
        An array of the same type, or `array` itself where no path is relative.
    """
    kind = array.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = array.values
        new = with_folder(inner, folder)
        if new is inner:
            return array
        return type(array).from_arrays(_starts(array), new, type=kind, mask=array.is_null())
    if pa.types.is_fixed_size_list(kind):
        inner = array.values.slice(array.offset * kind.list_size, len(array) * kind.list_size)
        new = with_folder(inner, folder)
        return array if new is inner else type(array).from_arrays(new, type=kind, mask=array.is_null())
    if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
        fields = {field.name: array.field(field.name) for field in kind}
        paths = _absolute(fields["path"], folder, fields.get("bytes"))
        if paths is fields["path"]:
            return array
        parts = list((fields | {"path": paths}).values())
        return pa.StructArray.from_arrays(parts, fields=list(kind), mask=array.is_null())
    return _absolute(array, folder) if pa.types.is_string(kind) or pa.types.is_large_string(kind) else array


def _absolute(paths: pa.Array, folder: str | os.PathLike[str], encoded: pa.Array | None = None) -> pa.Array:
    """Paths with the folder before relative ones without bytes; itself if there is none."""
    if paths.null_count == len(paths) or (encoded is not None and not encoded.null_count):
        return paths
    given = paths.to_pylist()
    alone = [True] * len(given) if encoded is None else encoded.is_null().to_pylist()
    rows = [row for row, path in enumerate(given) if path and alone[row] and is_relative(path)]
    for row in rows:
        given[row] = os.path.join(os.path.abspath(folder), given[row])
    return pa.array(given, paths.type) if rows else paths


def _starts(array: pa.Array) -> pa.Array:
    """The offsets of an array of lists, in a buffer that begins with them: from_arrays takes no other beside a mask."""
    return pa.array(array.offsets.to_numpy())


@dataclasses.dataclass(frozen=True)
class _Gathered:
    """The function given to datasets.map that writes scattered rows in order: their copy as it is."""

    files: tuple[str, ...]

    def __call__(self, table: pa.Table) -> pa.Table:
        release_pages(self.files)
        return table


def _lists(column: str, array: pa.Array) -> pa.Array:
    """An array of a column of images as lists of {"bytes", "path"}; itself where it is that already."""
    kind = array.type
    if kind == _LIST:
        return array
    if pa.types.is_null(kind):
        return pa.nulls(len(array), _LIST)
    try:
        if pa.types.is_fixed_size_list(kind):
            array = array.cast(pa.list_(kind.value_type))
        if pa.types.is_nested(kind) and not pa.types.is_struct(kind):
            starts, values = _starts(array).cast(pa.int32()), _structs(array.values)
        else:
            starts, values = pa.array(np.arange(len(array) + 1, dtype=np.int32)), _structs(array)
    except (pa.ArrowException, TypeError) as error:
        raise DataError(
            f"column '{column}' holds no images: expected datasets' Image feature, structs of bytes and path, paths or "
            f"bytes, or lists of them, got Arrow's type {kind} ({error})"
        ) from None
    return pa.ListArray.from_arrays(starts, values, type=_LIST, mask=array.is_null())


def _structs(array: pa.Array) -> pa.Array:
    """An array of images, each null, a struct, a path or bytes, as structs of bytes and path. Raises TypeError."""
    kind, length = array.type, len(array)
    if kind == _STRUCT:
        return array
    encoded, paths = pa.nulls(length, pa.binary()), pa.nulls(length, pa.string())
    if pa.types.is_struct(kind) and {field.name for field in kind} & {"bytes", "path"}:
        encoded = array.field("bytes") if kind.get_field_index("bytes") >= 0 else encoded
        paths = array.field("path") if kind.get_field_index("path") >= 0 else paths
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        paths = array
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        encoded = array
    elif not pa.types.is_null(kind):
        raise TypeError(f"{kind} is no image")
    parts = [encoded.cast(pa.binary()), paths.cast(pa.string())]
    return pa.StructArray.from_arrays(parts, fields=list(_STRUCT), mask=array.is_null())


# ---- of a stream ----------------------------------------------------------------------------------------------------


def undecoded(stream: IterableDataset) -> IterableDataset:
    """Return a stream that shows images as they are encoded, {"bytes", "path"}, where datasets would decode them."""
    for name, feature in (stream.features or {}).items():
        if name in ROW_IMAGES and (shown := _undecoded(feature)) != feature:
            stream = stream.cast_column(name, shown)
    return stream


def _undecoded(feature: Any) -> Any:
    if isinstance(feature, (List, LargeList)):
        return dataclasses.replace(feature, feature=_undecoded(feature.feature))
    return dataclasses.replace(feature, decode=False) if isinstance(feature, ImageFeature) else feature


def dataset_of(rows: Iterable[Mapping[str, Any]], features: Features | None, first_row: int = 0) -> Dataset:
    """Return a Dataset of rows, with PIL images as stored() makes them.

    datasets would encode a JPEG that it has decoded anew, with loss.

    Args:
        rows: of a stream.
        features: the stream's, None where they are not known.
        first_row: the number of the first row, for messages.

    Raises:
        DataError: a PIL image that cannot be read, with its row.
    """
    return Dataset.from_list([_with_stored(row, number) for number, row in enumerate(rows, first_row)], features)


def _with_stored(row: Mapping[str, Any], number: int) -> dict[str, Any]:
    found = dict(row)
    for name in ROW_IMAGES:
        images = images_of(row.get(name))
        if not any(isinstance(image, Image.Image) for image in images):
            continue
        try:
            new = stored(images)
        except BadRow as problem:
            raise DataError(f"{place('row', number)}: {problem}") from problem
        found[name] = new if isinstance(row[name], (list, tuple)) else new[0]
    return found
