"""What a row of a token-level dataset holds, a pair or a list: prompt and responses, their weights, its reference.

Placeholders of different images are equal token ids. Where a prompt has images, the tokens of RowTokens are virtual ids
there, 2**30 + 30 bits of the image's key, so that prompts are equal where both their text and their images are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from dpofast.data.formats import (
    ID_COLUMNS,
    LIST_ID_COLUMNS,
    LIST_REF_COLUMN,
    LIST_WEIGHT_COLUMN,
    RANK_COLUMN,
    REF_COLUMNS,
    ROW_COLUMNS,
    SCORE_COLUMN,
    WEIGHT_COLUMNS,
)
from dpofast.data.images.columns import IMAGE_KEYS, IMAGE_TOKEN_ID, IMAGE_TOKENS, IMAGES, OF_IMAGES, has_images

PROMPT, RESPONSES = LIST_ID_COLUMNS
# Every column that decides what a loss is, but for reference log-probs: what must be equal in a resumed run.
DECIDING_COLUMNS = (
    *ID_COLUMNS,
    *(RESPONSES, RANK_COLUMN, SCORE_COLUMN),
    *ROW_COLUMNS,
    *(*WEIGHT_COLUMNS, LIST_WEIGHT_COLUMN),
)
_VIRTUAL = 2**30  # token ids are below
_KEY_BYTES = 16


def optional_columns(columns: Collection[str] | None) -> list[str]:
    """Of these columns, those beside a pair's token ids that decide what its loss is."""
    return sorted({*DECIDING_COLUMNS}.difference(ID_COLUMNS).intersection(columns or ()))


def has_lists(columns: Collection[str] | None) -> bool:
    """Whether rows with these columns are lists of responses, and not pairs."""
    return RESPONSES in (columns or ())


def reference_columns(columns: Collection[str] | None) -> tuple[str, ...]:
    """The names under which reference log-probs stand beside these columns: two for pairs, one for lists."""
    lists = has_lists(columns) or LIST_REF_COLUMN in (columns or ())
    return (LIST_REF_COLUMN,) if lists else REF_COLUMNS


def has_reference(columns: Collection[str] | None) -> bool:
    """Whether rows with these columns bring reference log-probs."""
    return set(reference_columns(columns)) <= set(columns or ())


def without_reference(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without its reference log-probs."""
    return {name: value for name, value in row.items() if name not in (*REF_COLUMNS, LIST_REF_COLUMN)}


def token_columns(columns: Collection[str]) -> tuple[str, ...]:
    """Of these columns, those that hold the token ids of a row: prompt, then responses."""
    return LIST_ID_COLUMNS if has_lists(columns) else ID_COLUMNS


def image_columns(columns: Collection[str]) -> tuple[str, ...]:
    """Of these columns, those that say which images a prompt has: their keys, numbers of placeholders, token id."""
    return OF_IMAGES if has_images(columns) else ()


def weight_names(*, lists: bool) -> tuple[str, ...]:
    """The columns that weight the tokens of lists, or of pairs."""
    return (LIST_WEIGHT_COLUMN,) if lists else WEIGHT_COLUMNS


def weight_columns(columns: Collection[str]) -> tuple[str, ...]:
    """Of these columns, those that weight tokens. Of a pair there may be one: the other response's weights are 1."""
    return tuple(name for name in weight_names(lists=has_lists(columns)) if name in columns)


def as_numpy(dataset: Dataset) -> Dataset:
    """A token-level dataset whose rows are numpy arrays, but for token weights and images: lists, or None."""
    as_lists = (*WEIGHT_COLUMNS, LIST_WEIGHT_COLUMN, IMAGES, *OF_IMAGES)
    plain = [name for name in dataset.column_names if name not in as_lists]
    return dataset.with_format("numpy", columns=plain, output_all_columns=plain != dataset.column_names)


def responses_of(row: Mapping[str, Any]) -> list[Any]:
    """The token ids of a row's responses: of a list best first, of a pair chosen and rejected."""
    return list(row[RESPONSES]) if has_lists(row) else [row[name] for name in ID_COLUMNS[1:]]


def best_weight(row: Mapping[str, Any]) -> float:
    """What the tokens of a row's chosen, or best, response count together: their number, or the sum of weights."""
    weights = row.get(WEIGHT_COLUMNS[0])
    if has_lists(row) and (of_all := row.get(LIST_WEIGHT_COLUMN)) is not None:
        weights = of_all[0]
    return len(responses_of(row)[0]) if weights is None else float(np.sum(weights, dtype=np.float64))


@dataclass(frozen=True, eq=False)
class RowImages:
    """The images of n prompts, M of them one after another.

    Attributes:
        bounds: (n + 1,) int64; prompt i has the images bounds[i] to bounds[i + 1] − 1.
        keys: (M, 16) uint8, equal for equal images.
        num_tokens: (M,) int32, placeholders of each image.
        token_ids: (n,) int64, of each prompt's placeholders; −1 where it has no images.
    """

    bounds: np.ndarray
    keys: np.ndarray
    num_tokens: np.ndarray
    token_ids: np.ndarray

    @classmethod
    def of(cls, table: pa.Table) -> RowImages:
        """Those of a table with the columns image_columns().

        Raises:
            ValueError: keys that are not 16 bytes, another number of image_tokens than of keys, or no image_token_id.
        """
        keys, tokens, token_id = (table.column(name).combine_chunks() for name in OF_IMAGES)
        counts, of_tokens = (pc.fill_null(pc.list_value_length(column), 0).to_numpy() for column in (keys, tokens))
        content = keys.flatten().to_pylist()
        num_tokens = tokens.flatten().to_numpy(zero_copy_only=False)
        whole = np.array_equal(counts, of_tokens) and bool((num_tokens >= 1).all())  # not of a null, which is NaN
        if not whole or any(key is None or len(key) != _KEY_BYTES for key in content):
            raise ValueError(
                f"{IMAGE_KEYS}: expected {_KEY_BYTES} bytes for each image, beside its 1 or more placeholders in "
                f"{IMAGE_TOKENS}, got others: tokenize the data again"
            )
        token_ids = np.where(counts > 0, pc.fill_null(token_id, -1).to_numpy(zero_copy_only=False), -1)
        if (token_ids[counts > 0] < 0).any():
            raise ValueError(f"{IMAGE_TOKEN_ID}: expected a token id in every row with {IMAGE_KEYS}: tokenize again")
        return cls(
            bounds=np.append(0, np.cumsum(counts, dtype=np.int64)),
            keys=np.frombuffer(b"".join(content), np.uint8).reshape(-1, _KEY_BYTES),
            num_tokens=num_tokens.astype(np.int32),
            token_ids=token_ids.astype(np.int64),
        )

    def virtual_ids(self, values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """The tokens of all prompts, int32, with virtual ids in the placeholders, whose order is that of the images.

        Raises:
            ValueError: a prompt with another number of placeholders than its images have.
        """
        rows = np.repeat(np.arange(len(self.token_ids)), np.diff(offsets))
        places = values == self.token_ids[rows]
        found = np.bincount(rows[places], minlength=len(self.token_ids))
        owners = np.repeat(np.arange(len(self.token_ids)), np.diff(self.bounds))
        expected = np.bincount(owners, self.num_tokens, minlength=len(self.token_ids)).astype(np.int64)
        if (found != expected).any():
            row = int((found != expected).argmax())
            own = self.num_tokens[self.bounds[row] : self.bounds[row + 1]].tolist()
            begins = values[offsets[row] : offsets[row + 1]][:8].tolist()
            raise ValueError(
                f"prompt_ids: expected {expected[row]} image placeholders (token id {self.token_ids[row]}), as "
                f"{IMAGE_TOKENS} says ({own}), got {found[row]} in a prompt that begins with {begins}: cut no prompt "
                "inside an image, and take token ids and images from one tokenization"
            )
        numbers = np.ascontiguousarray(self.keys[:, :4]).view("<u4")[:, 0] % _VIRTUAL + _VIRTUAL
        tokens = values.astype(np.int32)
        tokens[places] = np.repeat(numbers.astype(np.int32), self.num_tokens)
        return tokens


def prompts_of(table: pa.Table) -> tuple[np.ndarray, np.ndarray, RowImages | None]:
    """Values and offsets of the prompts of a table with prompt_ids and image_columns(), and their images."""
    values, offsets = _values(table.column(PROMPT).combine_chunks())
    if not has_images(table.column_names):
        return values, offsets, None
    images = RowImages.of(table)
    return images.virtual_ids(values, offsets), offsets, images


@dataclass(frozen=True, eq=False)
class RowTokens:
    """The token ids of n rows with R responses, as views of an Arrow table's buffers.

    Responses are numbered row by row, in a list best first, in a pair chosen before rejected.

    Attributes:
        prompts: values and (n + 1,) offsets of the prompts' tokens; with virtual ids where images is not None.
        images: of the prompts; None where the table has no image_columns().
        bounds: (n + 1,) int64; row i has the responses bounds[i] to bounds[i + 1] − 1.
        lengths: (R,) int64, tokens of every response.
    """

    prompts: tuple[np.ndarray, np.ndarray]
    images: RowImages | None
    bounds: np.ndarray
    lengths: np.ndarray
    _responses: list[pa.Array]
    _weights: list[pa.Array]

    @classmethod
    def of(cls, table: pa.Table) -> RowTokens:
        """Those of a table with the columns token_columns(), and weight_columns() where the rows have some.

        Raises:
            ValueError: image_columns() that contradict the prompts.
        """
        _, *names = token_columns(table.column_names)
        responses = [table.column(name).combine_chunks() for name in names]
        weights = [
            table.column(name).combine_chunks() if name in table.column_names else pa.nulls(len(table))
            for name in weight_names(lists=len(names) == 1)
        ]
        if len(names) == 1:
            (lists,) = responses
            bounds = lists.offsets.to_numpy().astype(np.int64)
            responses, bounds = [lists.flatten()], bounds - bounds[0]
        else:
            bounds = 2 * np.arange(len(table) + 1)
        lengths = np.stack([np.diff(each.offsets.to_numpy()) for each in responses], axis=1).ravel().astype(np.int64)
        values, offsets, images = prompts_of(table)
        return cls((values, offsets), images, bounds, lengths, responses, weights)

    def responses(self) -> Iterator[np.ndarray]:
        """The token ids of every response."""
        parts = [_values(each) for each in self._responses]
        bounds = [offsets.tolist() for _, offsets in parts]
        for index in range(len(self._responses[0])):
            for (values, _), starts in zip(parts, bounds, strict=True):
                yield values[starts[index] : starts[index + 1]]

    def weights(self) -> np.ndarray | None:
        """float32 weights of all responses' tokens, one behind the other; 1 where a row has none. None without any."""
        if not any(len(each) > each.null_count for each in self._weights):
            return None
        filled = np.ones(self.lengths.sum(), np.float32)
        starts = np.cumsum(self.lengths) - self.lengths
        for number, values in self._given_weights():
            filled[starts[number] : starts[number] + len(values)] = values
        return filled

    def _given_weights(self) -> Iterator[tuple[int, np.ndarray]]:
        """(number of a response, its weights) of the responses that have some."""
        for side, column in enumerate(self._weights):
            for row, given in enumerate(column.is_valid().to_pylist()):
                if not given:
                    continue
                own = column[row].values
                if len(self._weights) == 2:
                    yield 2 * row + side, own.to_numpy(zero_copy_only=False)
                    continue
                for place, each in enumerate(own):
                    if each.is_valid:
                        yield self.bounds[row] + place, each.values.to_numpy(zero_copy_only=False)


def _values(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """int32 values and int64 offsets, from 0, of a list column of token ids."""
    offsets = column.offsets.to_numpy().astype(np.int64)
    return column.flatten().to_numpy(zero_copy_only=False).astype(np.int32, copy=False), offsets - offsets[0]
