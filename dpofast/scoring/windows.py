"""Rows that are scored together: pairs or lists for `pack`, and what stands beside their token ids."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from dpofast.data.arrow import chunk_bounds, read_chunks
from dpofast.data.formats import (
    LIST_REF_COLUMN,
    LIST_WEIGHT_COLUMN,
    ORDER_COLUMN,
    RANK_COLUMN,
    REF_COLUMNS,
    SCORE_COLUMN,
    WEIGHT_COLUMNS,
)
from dpofast.data.images.columns import IMAGES, has_images
from dpofast.data.lists import OF_RESPONSES
from dpofast.data.token_rows import (
    RESPONSES,
    RowTokens,
    has_lists,
    reference_columns,
    responses_of,
    token_columns,
    weight_columns,
)
from dpofast.scoring.pixels import MEDIA, PIXEL_BYTES, STORED_COLUMNS, pixel_bytes

# Of a list, what has a value for each response.
_OF_RESPONSES = (*OF_RESPONSES, RANK_COLUMN, SCORE_COLUMN)


@dataclass(frozen=True, eq=False)
class Window:
    """Rows that are scored together.

    Attributes:
        examples: pairs or lists (these best first), in a form that response_logps takes, without what changes no
            log-prob.
        is_list: whether they are lists.
        weights: (sum of lengths,) float32 of the tokens of every row's responses, row by row; None without any.
        beside: columns that stand beside the token ids, a list each: reference log-probs, row numbers, betas, and of
            lists the place of every response in the row of the source.
    """

    examples: Any
    is_list: bool
    weights: Tensor | None
    beside: dict[str, list[Any]]

    def reference(self) -> Tensor | None:
        """(P, K) float32, nats: the rows' own reference log-probs, filled with 0, or None."""
        names = reference_columns((RESPONSES,) if self.is_list else ())
        if names[0] not in self.beside:
            return None
        if not self.is_list:
            return torch.tensor([self.beside[name] for name in names], dtype=torch.float32).T
        rows = [torch.tensor(row, dtype=torch.float32) for row in self.beside[names[0]]]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def betas(self) -> Tensor | None:
        """(P,) float32: the rows' own betas, or None. Raises ValueError for one that is not a positive number."""
        if (given := self.beside.get("beta")) is None:
            return None
        values = torch.tensor([float("nan") if each is None else float(each) for each in given], dtype=torch.float32)
        for row, good in enumerate(((values > 0) & values.isfinite()).tolist()):
            if not good:
                raise ValueError(f"examples[{row}]: beta: expected a positive number, got {given[row]}")
        return values


def windows(dataset: Dataset | Iterable[Mapping[str, Any]], size: int) -> Iterator[Window]:
    """The rows of a Dataset or an iterable of mappings, `size` at a time; fewer where mappings bring much media.

    Raises:
        ValueError: a column that only some of the rows have, or lists among pairs.
    """
    columns = dataset.column_names if isinstance(dataset, Dataset) else ()
    # lists that tokenize_preferences has not put in order are read row by row
    if not isinstance(dataset, Dataset) or (has_lists(columns) and ORDER_COLUMN not in columns):
        yield from map(_of_mappings, _parts(dataset, size))
        return
    is_list, ids = has_lists(columns), token_columns(columns)
    packed = [*ids, *([RANK_COLUMN] if is_list else []), *stored_images(columns)]
    weights, given = weight_columns(columns), [name for name in _beside(is_list) if name in columns]
    names = dict.fromkeys(name for name in (*packed, *weights, *given) if name != IMAGES)  # row may be in two of them
    bounds = chunk_bounds(len(dataset), size)
    for part, table in zip(bounds, read_chunks(dataset, names, bounds), strict=True):
        yield Window(
            rows_with_images(dataset, packed, *part) if IMAGES in packed else table.select(packed),
            is_list,
            _tensor(RowTokens.of(table).weights()) if weights else None,
            {name: table.column(name).to_pylist() for name in given},
        )


def rows_with_images(dataset: Dataset, columns: Collection[str], start: int, stop: int) -> Dataset:
    """These columns of a chunk of rows, of which response_logps reads the encoded images one row at a time."""
    return dataset.with_format(None).select_columns(list(columns)).select(range(start, stop))


def stored_images(columns: Collection[str]) -> tuple[str, ...]:
    """Of a token-level dataset's columns, those from which the pixels of its images are made; none without images."""
    return tuple(name for name in STORED_COLUMNS if name in columns) if has_images(columns) else ()


def _parts(rows: Iterable[Mapping[str, Any]], size: int) -> Iterator[list[Mapping[str, Any]]]:
    """Up to `size` rows at a time, fewer where their media fill PIXEL_BYTES."""
    part, media = list[Mapping[str, Any]](), dict[int, int]()
    for row in rows:
        part.append(row)
        if (own := row.get(MEDIA)) is not None:
            media[id(own)] = pixel_bytes(own)
        if len(part) == size or sum(media.values()) >= PIXEL_BYTES:
            yield part
            part, media = [], {}
    if part:
        yield part


def _beside(is_list: bool) -> tuple[str, ...]:
    return (*((LIST_REF_COLUMN, ORDER_COLUMN) if is_list else REF_COLUMNS), "row", "beta")


def _of_mappings(rows: list[Mapping[str, Any]]) -> Window:
    is_list = has_lists(rows[0])
    if any(has_lists(row) != is_list for row in rows):
        raise ValueError(f"{RESPONSES}: expected it in every row or in none, and of these {len(rows)} some lack it")
    if is_list:
        rows = [_best_first(row) for row in rows]
    given = [name for name in _beside(is_list) if any(row.get(name) is not None for row in rows)]
    for name in given:
        if any(row.get(name) is None for row in rows):
            raise ValueError(f"{name}: expected it in every row or in none, and of these {len(rows)} some lack it")
    reference = reference_columns(rows[0])
    present = [name for name in reference if name in given]
    missing = [name for name in reference if name not in given]
    if present and missing:
        raise ValueError(f"{missing[0]}: expected it beside {present[0]}, and there is none")
    packed = (*token_columns(rows[0]), *((RANK_COLUMN, SCORE_COLUMN) if is_list else ()))
    columns = {name for row in rows for name in row}
    packed += (*((MEDIA,) if MEDIA in columns else ()), *stored_images(columns))
    # pack checks the weights of tokens where it is given them, and would keep equal responses of others apart
    examples = [{name: row.get(name) for name in packed} for row in rows]
    return Window(examples, is_list, _weights(rows), {name: [row[name] for row in rows] for name in given})


def _best_first(row: Mapping[str, Any]) -> dict[str, Any]:
    """A list in the order of its ranks or scores, as `pack` orders it, with the places that its responses had."""
    ranks, scores = row.get(RANK_COLUMN), row.get(SCORE_COLUMN)
    keys = ranks if ranks is not None else None if scores is None else [-score for score in scores]
    count = len(row[RESPONSES])
    if keys is None or len(keys) != count:
        return dict(row)  # pack says what is wrong with it
    order = np.argsort(np.asarray(keys, np.float64), kind="stable").tolist()
    sorted_row = {
        name: [value[index] for index in order] if name in _OF_RESPONSES and value is not None else value
        for name, value in row.items()
    }
    places = row.get(ORDER_COLUMN)
    return sorted_row | {ORDER_COLUMN: order if places is None else [places[index] for index in order]}


def _weights(rows: list[Mapping[str, Any]]) -> Tensor | None:
    """The weights of mappings."""
    found: list[Any] = []
    if all(row.get(name) is None for row in rows for name in (*WEIGHT_COLUMNS, LIST_WEIGHT_COLUMN)):
        return None
    for row in rows:
        responses = responses_of(row)
        weights = row.get(LIST_WEIGHT_COLUMN) if has_lists(row) else [row.get(name) for name in WEIGHT_COLUMNS]
        found += zip(responses, [None] * len(responses) if weights is None else weights, strict=True)
    parts = [np.ones(len(ids)) if weights is None else np.asarray(weights) for ids, weights in found]
    for (ids, _), part in zip(found, parts, strict=True):
        if part.shape != (len(ids),):
            raise ValueError(f"weights: expected {len(ids)} numbers, one a token of the response, got {part.shape}")
    return _tensor(np.concatenate(parts).astype(np.float32))


def _tensor(values: np.ndarray | None) -> Tensor | None:
    return None if values is None else torch.from_numpy(values)
