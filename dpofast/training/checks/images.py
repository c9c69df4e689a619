"""Whether data have images, which decides what of a composite model is trained, and whether the run can use them."""

from __future__ import annotations

import contextlib
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset

from dpofast.data.images.columns import IMAGE_KEYS, ROW_IMAGES

_ROWS = 100  # of encoded images at a time


def columns_with_images(columns: Any) -> list[str]:
    """Of the columns of rows or of a token-level dataset (None: not known), those that say whether rows have images."""
    known = columns or ()
    return [IMAGE_KEYS] if IMAGE_KEYS in known else [name for name in ROW_IMAGES if name in known]


def has_images(dataset: Any) -> bool:
    """Whether a row of a dataset has an image.

    Of a stream, and of a dataset whose columns a transform makes, whether it has columns of images.
    """
    if isinstance(dataset, Dataset):
        if _is_transformed(dataset):
            return bool(columns_with_images(shown_columns(dataset)))
        return any(_any_image(dataset, name) for name in columns_with_images(dataset.column_names))
    if isinstance(dataset, IterableDataset):
        columns = dataset.column_names
        return bool(columns_with_images(next(iter(dataset.take(1)), ()) if columns is None else columns))
    return False


def shown_columns(dataset: Dataset) -> list[str]:
    """The columns of a dataset's rows, those that its transform (Dataset.set_transform) makes of them."""
    if _is_transformed(dataset):
        with contextlib.suppress(Exception):  # tokenize_preferences says what is wrong with a transform
            return list(dataset[:1])
    return dataset.column_names


def _is_transformed(dataset: Dataset) -> bool:
    return dataset.format["type"] == "custom" and len(dataset) > 0


def _any_image(dataset: Dataset, name: str) -> bool:
    for table in dataset.select_columns([name]).with_format("arrow").iter(batch_size=_ROWS):
        column = table.column(name)
        if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            column = column.filter(pc.greater(pc.fill_null(pc.list_value_length(column), 0), 0))
        if len(column) > column.null_count:
            return True
    return False
