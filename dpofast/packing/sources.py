"""One optional column of examples as numbers, from mappings (RowSource) or from columns (TableSource).

Values are converted here and not checked: columns.py does that, alike for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpofast.packing.arguments import integers, numbers


class Ragged(NamedTuple):
    """Numbers of R items: those of item r are the next counts[r] values, none where `given` is False (a null).

    Attributes:
        values: (M,) float64, the numbers of one item after another.
        counts: (R,) int64.
        given: (R,) bool.
    """

    values: np.ndarray
    counts: np.ndarray
    given: np.ndarray


class Source(Protocol):
    """The optional columns of E examples, each None where all of it is null or missing."""

    def has(self, name: str) -> bool:
        """Whether there is such a column."""

    def floats(self, name: str) -> Ragged | None:
        """A column of one number an example: counts are 1, or 0 where it is null."""

    def lists(self, name: str) -> Ragged | None:
        """A column of a list of numbers an example."""

    def nested(self, name: str, counts: np.ndarray) -> Ragged | None:
        """A column of a list for each of an example's counts[e] responses, as one item a response."""


def check_counts(name: str, given: np.ndarray, found: np.ndarray, expected: np.ndarray, what: str) -> None:
    """ValueError for an example whose list is not as long as expected."""
    wrong = given & (found != expected)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(f"examples[{row}]: {name}: expected {expected[row]} {what}, got {found[row]}")


class RowSource:
    """The optional keys of examples that are mappings."""

    def __init__(self) -> None:
        """Start without examples."""
        self._count = 0
        self._columns: dict[str, dict[int, Any]] = {}

    def add(self, example: Mapping[str, Any], names: Iterable[str]) -> None:
        """Note these keys of the next example."""
        for name in names:
            value = example.get(name)
            if value is not None:
                self._columns.setdefault(name, {})[self._count] = value
        self._count += 1

    def has(self, name: str) -> bool:
        """As in Source."""
        return name in self._columns

    def floats(self, name: str) -> Ragged | None:
        """As in Source."""
        return self._ragged(name, lambda value, where: numbers([value], where))

    def lists(self, name: str) -> Ragged | None:
        """As in Source."""
        return self._ragged(name, numbers)

    def _ragged(self, name: str, read: Callable[[Any, str], np.ndarray]) -> Ragged | None:
        column = self._columns.get(name)
        if column is None:
            return None
        found = {row: read(value, f"examples[{row}]: {name}") for row, value in column.items()}
        return _joined([found.get(row) for row in range(self._count)])

    def nested(self, name: str, counts: np.ndarray) -> Ragged | None:
        """As in Source."""
        column = self._columns.get(name)
        if column is None:
            return None
        lists: list[np.ndarray | None] = []
        for row, expected in enumerate(counts.tolist()):
            if row not in column:
                lists += [None] * expected
                continue
            where = f"examples[{row}]: {name}"
            found = items(column[row], where)
            if len(found) != expected:
                raise ValueError(f"{where}: expected {expected} lists, one a response, got {len(found)}")
            lists += [None if value is None else numbers(value, f"{where}[{k}]") for k, value in enumerate(found)]
        return _joined(lists)


def items(value: Any, name: str) -> list[Any]:
    """The items of an iterable.

    Raises:
        ValueError: it is none.
    """
    try:
        return list(value)
    except TypeError as error:
        raise ValueError(f"{name}: expected a list, got {type(value).__name__}") from error


def _joined(lists: list[np.ndarray | None]) -> Ragged:
    values = [value for value in lists if value is not None]
    return Ragged(
        np.concatenate(values) if values else np.empty(0),
        np.array([0 if value is None else len(value) for value in lists], np.int64),
        np.array([value is not None for value in lists], bool),
    )


class TableSource:
    """The optional columns of an Arrow table, or of a mapping from names to arrays or (values, offsets).

    Args:
        table: the columns.
        count: examples, E.
    """

    def __init__(self, table: Mapping[str, Any], count: int) -> None:
        """Read nothing yet."""
        self._table, self._count = table, count

    def has(self, name: str) -> bool:
        """As in Source."""
        return self._column(name) is not None

    def floats(self, name: str) -> Ragged | None:
        """As in Source."""
        column = self._column(name)
        if column is None:
            return None
        if isinstance(column, (pa.Array, pa.ChunkedArray)):
            given = np.asarray(column.is_valid())
            values = _arrow_numbers(column.drop_null(), name)
        else:
            entries = column if isinstance(column, np.ndarray) and column.dtype != object else items(column, name)
            given = np.array([entry is not None for entry in entries], bool)
            values = numbers(entries if given.all() else [entry for entry in entries if entry is not None], name)
        self._check_rows(name, len(given))
        return Ragged(values, given.astype(np.int64), given) if given.any() else None

    def lists(self, name: str) -> Ragged | None:
        """As in Source."""
        column = self._column(name)
        if column is None:
            return None
        ragged = _arrow_lists(column, name) if isinstance(column, (pa.Array, pa.ChunkedArray)) else _parts(column, name)
        self._check_rows(name, len(ragged.given))
        return ragged

    def nested(self, name: str, counts: np.ndarray) -> Ragged | None:
        """As in Source."""
        column = self._column(name)
        if column is None:
            return None
        rows, inner = list_column(column, name)
        self._check_rows(name, len(rows.given))
        check_counts(name, rows.given, rows.counts, counts, "lists, one a response")
        of_given = _arrow_lists(inner, name)
        given = np.repeat(rows.given, counts)
        result = Ragged(of_given.values, np.zeros(len(given), np.int64), given.copy())
        result.counts[given], result.given[given] = of_given.counts, of_given.given
        return result

    def _column(self, name: str) -> Any:
        column = self._table.get(name)
        return None if getattr(column, "null_count", -1) == self._count else column

    def _check_rows(self, name: str, rows: int) -> None:
        if rows != self._count:
            raise ValueError(f"{name}: expected {self._count} rows, one an example, got {rows}")


def list_column(column: Any, name: str) -> tuple[Ragged, Any]:
    """The counts of an Arrow list column, whose values are left empty, and what its lists hold, one after another.

    Raises:
        ValueError: another column.
    """
    kind = getattr(column, "type", None)
    if kind is not None and pa.types.is_fixed_size_list(kind):
        column = column.cast(pa.large_list(kind.value_type))
    elif kind is None or not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        got = type(column).__name__ if kind is None else kind
        raise ValueError(f"{name}: expected an Arrow column of lists, got {got}")
    counts = np.asarray(pc.list_value_length(column).fill_null(0)).astype(np.int64)
    return Ragged(np.empty(0), counts, np.asarray(column.is_valid())), pc.list_flatten(column)


def _arrow_lists(column: pa.Array | pa.ChunkedArray, name: str) -> Ragged:
    rows, values = list_column(column, name)
    return rows._replace(values=_arrow_numbers(values, name))


def _arrow_numbers(column: pa.Array | pa.ChunkedArray, name: str) -> np.ndarray:
    """(M,) float64; NaN for a null."""
    kind = column.type
    if not any(check(kind) for check in (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)):
        if not pa.types.is_null(kind):
            raise ValueError(f"{name}: expected numbers, got {kind}")
    return np.asarray(column.cast(pa.float64(), safe=False)).astype(np.float64, copy=False)


def _parts(column: Any, name: str) -> Ragged:
    """Lists as (values, offsets)."""
    if not isinstance(column, (tuple, list)) or len(column) != 2:
        raise ValueError(
            f"{name}: expected (values, offsets) or an Arrow list column, got {type(column).__name__}; "
            "hand lists over as one mapping an example"
        )
    values, offsets = numbers(column[0], f"{name} values"), integers(column[1], f"{name} offsets").astype(np.int64)
    counts = np.diff(offsets)
    if len(offsets) == 0 or offsets[0] < 0 or offsets[-1] > len(values) or (counts < 0).any():
        raise ValueError(f"{name} offsets: expected them to ascend from 0 or more to at most {len(values)} values")
    return Ragged(values[offsets[0] : offsets[-1]], counts, np.ones(len(counts), bool))
