"""read_examples: mappings, numpy columns, an Arrow table or a Dataset -> FlatExamples for the C++ packer.

Token ids are not copied: int32 and int64 arrays and Arrow buffers are passed as pointers, lists are unpacked in C++.
Other types are converted first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from dpofast import _C
from dpofast.data.formats import ID_COLUMNS, LIST_ID_COLUMNS, REF_COLUMNS
from dpofast.packing.arguments import integers
from dpofast.packing.columns import (
    LIST_COLUMNS,
    PAIR_COLUMNS,
    FlatColumns,
    read_order,
    read_ref_logps,
    read_row_columns,
    read_token_weights,
    refuse_columns_of_pairs,
)
from dpofast.packing.sources import RowSource, Source, TableSource, items, list_column

_GROUP_COLUMNS = ("prompt_ids", "branches", "pairs")
_LIST_COLUMN = LIST_ID_COLUMNS[1]
# The keys of an example, for the messages of C++ (Form in csrc/groups.hpp).
_PAIR, _GROUP, _LIST = range(3)
_NONE = np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class FlatExamples:
    """E examples as flat arrays. A sequence is a prompt or a branch (response); each prompt precedes its branches.

    Attributes:
        sequences: the token ids of every sequence.
        branch_counts: (E,) int64, branches of each example.
        pair_counts: (E,) int64, pairs of each example; 1 for a list.
        members: (M,) int64, branches, numbered from 0 in each example: chosen and rejected of every pair, or the
            responses of every list, best first.
        forms: (E,) uint8, the keys that the example was given by.
        refs: float64 reference log-prob in nats of every sequence (NaN for prompts), or None.
        columns: what else the examples say.
    """

    sequences: _C.Sequences
    branch_counts: np.ndarray
    pair_counts: np.ndarray
    members: np.ndarray
    forms: np.ndarray
    refs: np.ndarray | None
    columns: FlatColumns

    def packer(
        self, *, max_tokens: int, max_targets: int, share: str, vocab_size: int = _C.UNLIMITED, threads: int = 1
    ) -> _C.Packer:
        """The examples grouped and planned.

        Raises:
            ValueError: an example is invalid.
        """
        order, weights = self.columns.order, self.columns.weights
        return _C.Packer(
            self.sequences,
            self.branch_counts,
            self.pair_counts,
            self.members,
            _NONE if order is None else order.counts,
            _NONE if order is None else order.ranks,
            _NONE if weights is None else weights.variants,
            self.forms,
            max_tokens=max_tokens,
            max_targets=max_targets,
            share=share,
            vocab_size=vocab_size,
            threads=threads,
        )


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
    if table.get(_LIST_COLUMN) is not None:
        return _read_list_columns(table)
    missing = [name for name in ID_COLUMNS if table.get(name) is None]
    if missing:
        raise ValueError(
            f"examples: the columns {', '.join(missing)} are missing; expected {', '.join(ID_COLUMNS)}, "
            f"got {', '.join(map(str, table))}"
        )
    sequences = _C.Sequences.from_columns([_chunks(table[name], name) for name in ID_COLUMNS])
    count = len(sequences) // 3
    branch_counts = np.full(count, 2, np.int64)
    return FlatExamples(
        sequences=sequences,
        branch_counts=branch_counts,
        pair_counts=np.ones(count, np.int64),
        members=np.arange(2 * count) % 2,
        forms=np.full(count, _PAIR, np.uint8),
        refs=_ref_columns(table, count),
        columns=_pair_columns(TableSource(table, count), sequences, branch_counts),
    )


def _read_list_columns(table: Mapping[str, Any]) -> FlatExamples:
    if table.get(LIST_ID_COLUMNS[0]) is None:
        raise ValueError(
            f"examples: the column {LIST_ID_COLUMNS[0]} is missing; expected {', '.join(LIST_ID_COLUMNS)}, "
            f"got {', '.join(map(str, table))}"
        )
    rows, inner = list_column(table[_LIST_COLUMN], _LIST_COLUMN)
    if not rows.given.all():
        raise ValueError(f"examples[{rows.given.argmin()}]: {_LIST_COLUMN} is null; expected lists of token ids")
    ends = rows.counts.cumsum()

    def where(response: int) -> str:
        row = int(np.searchsorted(ends, response, side="right"))
        return f"examples[{row}]: {_LIST_COLUMN}[{response - ends[row] + rows.counts[row]}]"

    prompts = _C.Sequences.from_columns([_chunks(table[LIST_ID_COLUMNS[0]], LIST_ID_COLUMNS[0])])
    if len(prompts) != len(rows.counts):
        raise ValueError("examples: columns differ in length")
    responses = _C.Sequences.from_columns([_chunks(inner, _LIST_COLUMN, where)])
    sequences = _C.Sequences.of_lists(prompts, responses, rows.counts)
    return _lists(sequences, rows.counts, TableSource(table, len(rows.counts)))


def _pair_columns(source: Source, sequences: _C.Sequences, branch_counts: np.ndarray) -> FlatColumns:
    return FlatColumns(
        rows=read_row_columns(source, len(branch_counts)),
        order=None,
        weights=read_token_weights(source, sequences, branch_counts, lists=False),
    )


def _lists(sequences: _C.Sequences, counts: np.ndarray, source: Source) -> FlatExamples:
    """Lists of so many responses, whose other columns the source has."""
    refuse_columns_of_pairs(source)
    order = read_order(source, counts)
    refs, ref_logps = None, read_ref_logps(source, counts)
    if ref_logps is not None:
        prompts = np.zeros(len(sequences), bool)
        prompts[(counts + 1).cumsum() - counts - 1] = True
        refs = np.full(len(sequences), math.nan)
        refs[~prompts] = ref_logps
    return FlatExamples(
        sequences=sequences,
        branch_counts=counts,
        pair_counts=np.ones(len(counts), np.int64),
        members=order.members,
        forms=np.full(len(counts), _LIST, np.uint8),
        refs=refs,
        columns=FlatColumns(
            rows=read_row_columns(source, len(counts)),
            order=order,
            weights=read_token_weights(source, sequences, counts, lists=True),
        ),
    )


def lexicographic_order(column: pa.ChunkedArray, name: str) -> np.ndarray:
    """Rows of a list column of token ids, ascending by content, equal ones by number: (n,) int64.

    Raises:
        ValueError: another column, or an id that is negative or 2**31 and more.
    """
    return _C.lexicographic_order(_C.Sequences.from_columns([_chunks(column, name)]))


def _chunks(column: Any, name: str, where: Callable[[int], str] | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (values, offsets) of every chunk of a list column; where(row) names a row in messages."""
    where = where or (lambda row: f"examples[{row}]: {name}")
    if isinstance(column, pa.ChunkedArray):
        start, parts = 0, []
        for chunk in column.chunks:
            parts.append(_list_array(chunk, name, start, where))
            start += len(chunk)
        return parts
    if isinstance(column, pa.Array):
        return [_list_array(column, name, 0, where)]
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


def _list_array(
    column: pa.Array, name: str, first_row: int, where: Callable[[int], str]
) -> tuple[np.ndarray, np.ndarray]:
    if pa.types.is_fixed_size_list(column.type):
        column = column.cast(pa.large_list(column.type.value_type))
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise ValueError(f"{name}: expected lists of integers, got {column.type}")
    if not pa.types.is_integer(column.type.value_type):
        raise ValueError(f"{name}: expected lists of integers, got lists of {column.type.value_type}")
    if column.null_count:
        row = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
        raise ValueError(f"{where(first_row + row)} is null; expected token ids")
    offsets = column.offsets.to_numpy()
    values = column.values
    if values.null_count:
        # Ignore nulls outside the rows: a slice shares its values buffer with the rows before and after it.
        inside = values.slice(int(offsets[0]), int(offsets[-1] - offsets[0])).is_null().to_numpy(zero_copy_only=False)
        if inside.any():
            row = int(np.searchsorted(offsets, offsets[0] + inside.argmax(), side="right")) - 1
            raise ValueError(f"{where(first_row + row)} holds a null; expected token ids")
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
    sequences = _C.Sequences.from_objects(rows.sequences, rows.converted)
    branch_counts = np.array(rows.branch_counts, np.int64)
    if rows.forms and rows.forms[0] == _LIST:
        return _lists(sequences, branch_counts, rows.source)
    return FlatExamples(
        sequences=sequences,
        branch_counts=branch_counts,
        pair_counts=np.array(rows.pair_counts, np.int64),
        members=np.array(rows.members, np.int64),
        forms=np.array(rows.forms, np.uint8),
        refs=np.array(rows.refs, np.float64) if rows.refs else None,
        columns=_pair_columns(rows.source, sequences, branch_counts),
    )


class _Rows:
    def __init__(self) -> None:
        self.sequences: list[Any] = []
        self.branch_counts: list[int] = []
        self.pair_counts: list[int] = []
        self.members: list[int] = []
        self.forms: list[int] = []
        self.refs: list[float] = []  # one for each sequence (NaN for prompts) of pairs, or empty
        self.source = RowSource()

    def add(self, index: int, example: Mapping[str, Any]) -> None:
        row = f"examples[{index}]: "
        if not isinstance(example, Mapping):
            raise ValueError(f"{row}expected a mapping, got {type(example).__name__}")
        form = _form(example, row)
        if index and (form == _LIST) != (self.forms[0] == _LIST):
            one, other = ("a list", "pairs") if form == _LIST else ("a pair", "lists")
            raise ValueError(f"{row}is {one} among {other}; pack them in two calls")
        self.forms.append(form)
        if form == _LIST:
            responses = items(example[_LIST_COLUMN], row + _LIST_COLUMN)
            self.sequences += (example[LIST_ID_COLUMNS[0]], *responses)
            self.branch_counts.append(len(responses))
            self.source.add(example, LIST_COLUMNS)
            return
        refs: Sequence[float] | None
        if form == _GROUP:
            prompt, branches, pairs = (example[key] for key in _GROUP_COLUMNS)
            branches = items(branches, row + "branches")
            pairs = _pairs(pairs, row + "pairs")
            refs = _group_refs(example.get("ref_logps"), row + "ref_logps", len(branches))
            self.sequences += (prompt, *branches)
            self.branch_counts.append(len(branches))
            self.pair_counts.append(len(pairs))
            for pair in pairs:
                self.members += pair
        else:
            refs = _pair_refs(example, row)
            self.sequences += [example[key] for key in ID_COLUMNS]
            self.branch_counts.append(2)
            self.pair_counts.append(1)
            self.members += (0, 1)
        self.source.add(example, PAIR_COLUMNS if len(example) > len(ID_COLUMNS) else ())
        if index and bool(self.refs) != (refs is not None):
            raise ValueError(
                f"examples[{index}]: {'no' if refs is None else 'has'} reference log-probs, unlike the examples before "
                "it; give them for all examples or none"
            )
        if refs is not None:
            self.refs += (math.nan, *refs)

    def converted(self, sequence: int) -> np.ndarray:
        """Convert a sequence that C++ cannot read directly (other integer types, tensors, strided arrays) to int64.

        Raises:
            ValueError: the sequence does not hold integers.
        """
        ends = np.cumsum(np.array(self.branch_counts) + 1)
        example = int(np.searchsorted(ends, sequence, side="right"))
        place = sequence - int(ends[example]) + self.branch_counts[example] + 1
        names = {_PAIR: ID_COLUMNS[place] if place < 3 else "", _GROUP: f"branches[{place - 1}]"}
        name = names.get(self.forms[example], f"{_LIST_COLUMN}[{place - 1}]") if place else ID_COLUMNS[0]
        array = integers(self.sequences[sequence], f"examples[{example}]: {name}")
        return np.require(array, np.int64, ["C", "A"])


def _form(example: Mapping[str, Any], row: str) -> int:
    """The form of an example; ValueError for one that has keys of two, or misses one."""
    if len(example) == len(ID_COLUMNS) and all(example.get(key) is not None for key in ID_COLUMNS):
        return _PAIR
    # In a table that mixes forms, each row has the columns of the others with value None.
    grouped, listed = (example.get(key) is not None for key in ("branches", _LIST_COLUMN))
    others = [key for key in (*ID_COLUMNS[1:], _LIST_COLUMN) if example.get(key) is not None] if grouped else []
    if others:
        raise ValueError(f"{row}has both branches and {' and '.join(others)}; give one form")
    if grouped:
        ambiguous = [key for key in PAIR_COLUMNS if example.get(key) is not None]
        if ambiguous:
            raise ValueError(
                f"{row}has {', '.join(ambiguous)} beside branches, which may form several pairs; give each pair as a "
                "row of prompt_ids, chosen_ids and rejected_ids"
            )
    keys = _GROUP_COLUMNS if grouped else LIST_ID_COLUMNS if listed else ID_COLUMNS
    missing = [key for key in keys if example.get(key) is None]
    if missing:
        raise ValueError(
            f"{row}{', '.join(missing)} missing; expected prompt_ids, chosen_ids, rejected_ids, or prompt_ids, "
            f"responses_ids, or prompt_ids, branches, pairs; got {', '.join(map(str, example))}"
        )
    return _GROUP if grouped else _LIST if listed else _PAIR


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
    refs = items(value, name)
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
