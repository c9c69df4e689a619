"""read_examples: mappings, numpy columns, an Arrow table or a Dataset -> FlatExamples for the C++ packer.

Token ids are not copied: int32 and int64 arrays and Arrow buffers are passed as pointers, lists are unpacked in C++.
Other types are converted first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from dpofast import _C
from dpofast.data.formats import ID_COLUMNS, REF_COLUMNS
from dpofast.packing.arguments import integers

_GROUP_COLUMNS = ("prompt_ids", "branches", "pairs")


@dataclass(frozen=True, eq=False)
class FlatExamples:
    """E examples as flat arrays. A sequence is a prompt or a branch (response); each prompt precedes its branches.

    Attributes:
        sequences: the token ids of every sequence.
        branch_counts: (E,) int64, branches of each example.
        pair_counts: (E,) int64, pairs of each example.
        pairs: (Q, 2) int64, chosen and rejected branch, numbered from 0 in each example.
        grouped: (E,) uint8, 1 where the example was given as prompt_ids, branches and pairs.
        refs: float64 reference log-prob in nats of every sequence (NaN for prompts), or None.
    """

    sequences: _C.Sequences
    branch_counts: np.ndarray
    pair_counts: np.ndarray
    pairs: np.ndarray
    grouped: np.ndarray
    refs: np.ndarray | None


def read_examples(examples: Any) -> FlatExamples:
    """Convert any input of `dpofast.pack` to FlatExamples.

    Raises:
        ValueError: an example or column is invalid; the message names it.
    """
    _refuse_containers(examples)
    if hasattr(examples, "with_format") and hasattr(examples, "__getitem__"):  # a datasets.Dataset
        examples = _shown(examples)
    if isinstance(examples, (pa.Table, pa.RecordBatch)):
        if "branches" in examples.schema.names:
            return _read_rows(examples.to_pylist())
        examples = dict(zip(examples.schema.names, examples.columns, strict=True))
    return _read_columns(examples) if isinstance(examples, Mapping) else _read_rows(examples)


def _shown(dataset: Any) -> Any:
    """What a Dataset shows: an Arrow table of the columns that its format does not hide, or the rows of a transform."""
    view = dataset.format
    if view["type"] == "custom":
        return list(dataset)
    return dataset.with_format("arrow", columns=None if view["output_all_columns"] else view["columns"])[:]


def _refuse_containers(examples: Any) -> None:
    """Raise ValueError for containers whose iteration does not yield rows, with the conversion to use."""
    name = type(examples).__name__
    way = {
        "DataFrame": "pass pyarrow.Table.from_pandas(frame), or frame.to_dict('records')",
        "IterableDataset": "pass a list of its rows (list(dataset.take(n))), or save it and load it as a Dataset",
        "DatasetDict": "choose one of its splits",
        "IterableDatasetDict": "choose one of its splits, and pass a list of its rows",
    }.get(name)
    rows = isinstance(examples, (Iterable, pa.Table, pa.RecordBatch)) and not isinstance(examples, (str, bytes))
    if way is None and not rows:
        way = "pass a list of mappings, an Arrow table or a datasets.Dataset"
    if way is not None:
        raise ValueError(f"examples: expected mappings, an Arrow table, a Dataset or columns, got {name}: {way}")


# ---- columns ------------------------------------------------------------------------------------------------------


def _read_columns(table: Mapping[str, Any]) -> FlatExamples:
    missing = [name for name in ID_COLUMNS if table.get(name) is None]
    if missing:
        raise ValueError(
            f"examples: the columns {', '.join(missing)} are missing; expected {', '.join(ID_COLUMNS)}, "
            f"got {', '.join(map(str, table))}"
        )
    sequences = _C.Sequences.from_columns([_chunks(table[name], name) for name in ID_COLUMNS])
    count = len(sequences) // 3
    return FlatExamples(
        sequences=sequences,
        branch_counts=np.full(count, 2, np.int64),
        pair_counts=np.ones(count, np.int64),
        pairs=np.tile(np.array([0, 1], np.int64), (count, 1)),
        grouped=np.zeros(count, np.uint8),
        refs=_ref_columns(table, count),
    )


def lexicographic_order(column: pa.ChunkedArray, name: str) -> np.ndarray:
    """Rows of a list column of token ids, ascending by content, equal ones by number: (n,) int64.

    Raises:
        ValueError: another column, or an id that is negative or 2**31 and more.
    """
    return _C.lexicographic_order(_C.Sequences.from_columns([_chunks(column, name)]))


def _chunks(column: Any, name: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (values, offsets) of every chunk of a list column."""
    if isinstance(column, pa.ChunkedArray):
        start, parts = 0, []
        for chunk in column.chunks:
            parts.append(_list_array(chunk, name, start))
            start += len(chunk)
        return parts
    if isinstance(column, pa.Array):
        return [_list_array(column, name, 0)]
    if not isinstance(column, (tuple, list)) or len(column) != 2:
        raise ValueError(
            f"{name}: expected (values, offsets) or an Arrow list column, got {type(column).__name__}; "
            "hand lists over as one mapping an example"
        )
    values, offsets = _readable(column[0], f"{name} values"), _readable(column[1], f"{name} offsets")
    if len(offsets) == 0:
        raise ValueError(f"{name} offsets: expected one more than there are rows, got none")
    return [(values, offsets)]


def _readable(value: Any, name: str) -> np.ndarray:
    """Return the array itself if it is an aligned, contiguous int32 or int64 array, else a converted copy."""
    array = integers(value, name)
    dtype = array.dtype if array.dtype in (np.int32, np.int64) else np.dtype(np.int64)
    return np.require(array, dtype.newbyteorder("="), ["C", "A"])


def _list_array(column: pa.Array, name: str, first_row: int) -> tuple[np.ndarray, np.ndarray]:
    if pa.types.is_fixed_size_list(column.type):
        column = column.cast(pa.large_list(column.type.value_type))
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise ValueError(f"{name}: expected lists of integers, got {column.type}")
    if not pa.types.is_integer(column.type.value_type):
        raise ValueError(f"{name}: expected lists of integers, got lists of {column.type.value_type}")
    if column.null_count:
        row = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
        raise ValueError(f"examples[{first_row + row}]: {name} is null; expected token ids")
    offsets = column.offsets.to_numpy()
    values = column.values
    if values.null_count:
        # Ignore nulls outside the rows: a slice shares its values buffer with the rows before and after it.
        inside = values.slice(int(offsets[0]), int(offsets[-1] - offsets[0])).is_null().to_numpy(zero_copy_only=False)
        if inside.any():
            row = int(np.searchsorted(offsets, offsets[0] + inside.argmax(), side="right")) - 1
            raise ValueError(f"examples[{first_row + row}]: {name} holds a null; expected token ids")
        values = values.fill_null(0)
    return _readable(values.to_numpy(), name), offsets


def _ref_columns(table: Mapping[str, Any], count: int) -> np.ndarray | None:
    columns = [table.get(name) for name in REF_COLUMNS]
    columns = [None if getattr(column, "null_count", -1) == count else column for column in columns]
    if columns[0] is None and columns[1] is None:
        return None
    refs = np.full((count, 3), math.nan)
    for k, (name, column) in enumerate(zip(REF_COLUMNS, columns, strict=True)):
        if column is None:
            raise ValueError(f"{name}: expected {count} floats beside {REF_COLUMNS[1 - k]}, got no such column")
        try:
            values = np.asarray(column, np.float64)
        except (TypeError, ValueError, OverflowError) as error:  # text, ragged lists, integers beyond float64
            raise ValueError(f"{name}: expected {count} floats, one an example: {error}") from error
        if values.shape != (count,):
            raise ValueError(f"{name}: expected {count} floats, one an example, got shape {values.shape}")
        bad = ~np.isfinite(values)
        if bad.any():
            row = int(bad.argmax())
            raise ValueError(f"examples[{row}]: {name}: expected a finite float, got {values[row]}")
        refs[:, 1 + k] = values
    return refs.reshape(-1)


# ---- rows ---------------------------------------------------------------------------------------------------------


def _read_rows(examples: Iterable[Mapping[str, Any]]) -> FlatExamples:
    rows = _Rows()
    for index, example in enumerate(examples):
        rows.add(index, example)
    return FlatExamples(
        sequences=_C.Sequences.from_objects(rows.sequences, rows.converted),
        branch_counts=np.array(rows.branch_counts, np.int64),
        pair_counts=np.array(rows.pair_counts, np.int64),
        pairs=np.array(rows.pairs, np.int64).reshape(-1, 2),
        grouped=np.array(rows.grouped, np.uint8),
        refs=np.array(rows.refs, np.float64) if rows.refs else None,
    )


class _Rows:
    def __init__(self) -> None:
        self.sequences: list[Any] = []
        self.branch_counts: list[int] = []
        self.pair_counts: list[int] = []
        self.pairs: list[Any] = []
        self.grouped: list[bool] = []
        self.refs: list[float] = []  # one for each sequence (NaN for prompts), or empty

    def add(self, index: int, example: Mapping[str, Any]) -> None:
        if not isinstance(example, Mapping):
            raise ValueError(f"examples[{index}]: expected a mapping, got {type(example).__name__}")
        # In a table that mixes both forms, each row has the columns of the other form with value None.
        grouped = example.get("branches") is not None
        if grouped and any(example.get(key) is not None for key in ID_COLUMNS[1:]):
            raise ValueError(f"examples[{index}]: has both branches and chosen_ids or rejected_ids; give one form")
        values = [example.get(key) for key in (_GROUP_COLUMNS if grouped else ID_COLUMNS)]
        if any(value is None for value in values):
            keys = _GROUP_COLUMNS if grouped else ID_COLUMNS
            missing = [key for key, value in zip(keys, values, strict=True) if value is None]
            raise ValueError(
                f"examples[{index}]: {', '.join(missing)} missing; expected prompt_ids, chosen_ids, rejected_ids "
                f"or prompt_ids, branches, pairs; got {', '.join(map(str, example))}"
            )
        row = f"examples[{index}]: "
        refs: Sequence[float] | None
        if grouped:
            prompt, branches, pairs = values
            branches = _items(branches, row + "branches")
            pairs = _pairs(pairs, row + "pairs")
            refs = _group_refs(example.get("ref_logps"), row + "ref_logps", len(branches))
            self.sequences += (prompt, *branches)
            self.branch_counts.append(len(branches))
            self.pair_counts.append(len(pairs))
            self.pairs += pairs
        else:
            refs = _pair_refs(example, row)
            self.sequences += values
            self.branch_counts.append(2)
            self.pair_counts.append(1)
            self.pairs.append((0, 1))
        if index and bool(self.refs) != (refs is not None):
            raise ValueError(
                f"examples[{index}]: {'no' if refs is None else 'has'} reference log-probs, unlike the examples before "
                "it; give them for all examples or none"
            )
        if refs is not None:
            self.refs += (math.nan, *refs)
        self.grouped.append(grouped)

    def converted(self, sequence: int) -> np.ndarray:
        """Convert a sequence that C++ cannot read directly (other integer types, tensors, strided arrays) to int64.

        Raises:
            ValueError: the sequence does not hold integers.
        """
        ends = np.cumsum(np.array(self.branch_counts) + 1)
        example = int(np.searchsorted(ends, sequence, side="right"))
        place = sequence - int(ends[example]) + self.branch_counts[example] + 1
        name = f"branches[{place - 1}]" if place and self.grouped[example] else ID_COLUMNS[place]
        array = integers(self.sequences[sequence], f"examples[{example}]: {name}")
        return np.require(array, np.int64, ["C", "A"])


def _items(value: Any, name: str) -> list[Any]:
    try:
        return list(value)
    except TypeError as error:
        raise ValueError(f"{name}: expected a list, got {type(value).__name__}") from error


def _pairs(value: Any, name: str) -> list[list[int]]:
    return integers(value, f"{name} of (chosen, rejected) branch indices", columns=2).astype(np.int64).tolist()


def _pair_refs(example: Mapping[str, Any], row: str) -> tuple[float, float] | None:
    chosen, rejected = example.get("ref_chosen_logps"), example.get("ref_rejected_logps")
    if chosen is None and rejected is None:
        return None
    return _ref(chosen, row + "ref_chosen_logps"), _ref(rejected, row + "ref_rejected_logps")


def _group_refs(value: Any, name: str, branches: int) -> list[float] | None:
    if value is None:
        return None
    refs = _items(value, name)
    if len(refs) != branches:
        raise ValueError(f"{name}: expected {branches} floats, one a branch, got {len(refs)}")
    return [_ref(ref, f"{name}[{k}]") for k, ref in enumerate(refs)]


def _ref(value: Any, name: str) -> float:
    try:
        ref = float(value)
    except (TypeError, ValueError, OverflowError):
        ref = math.nan
    if not math.isfinite(ref):
        got = f"an int of {value.bit_length()} bits" if isinstance(value, int) else repr(value)
        raise ValueError(f"{name}: expected a finite float, got {got}")
    return ref
