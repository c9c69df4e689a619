"""Score files: a partial file from which a killed run resumes (PartialScores), and the final file (write_scored).

The partial file is JSON lines: a header with what decides the scores (model, data, options), then one line of scores a
pair, in the order in which pairs are scored. After a kill, scoring resumes at a multiple of WINDOW pairs, so that the
scores are bitwise those of an uninterrupted run. The final file has them in the order of the data; it is written under
a temporary name, flushed, and renamed.

Rows come back as the source has them: paths of images as they are given, encoded images in .parquet files alone.
"""

from __future__ import annotations

import json
import math
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from dpofast.common.atomic_files import put
from dpofast.data.arrow import chunk_bounds, read_chunks
from dpofast.data.files import Snapshot, kind_of
from dpofast.data.formats import LIST_REF_COLUMN, REF_COLUMNS
from dpofast.data.load import is_saved, source_files
from dpofast.data.read_rows import read_rows, unit_of
from dpofast.scoring.score import WINDOW

Row = dict[str, Any]
# The columns of scores. Where a source has some, they are of an earlier scoring, and are replaced or left out.
SCORES = (
    *("chosen_logps", "rejected_logps", *REF_COLUMNS, "chosen_tokens", "rejected_tokens"),
    *("responses_logps", LIST_REF_COLUMN, "responses_tokens"),
    *("chosen_rewards", "rejected_rewards", "responses_rewards", "margins"),
)


class PartialScores:
    """The partial file at `path`; a run resumes from it only if `identity` (JSON values) is equal to its header's."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Read and write nothing yet."""
        self.path = path
        self._header = json.dumps({"scored": identity}, sort_keys=True).encode() + b"\n"

    def resume(self, *, overwrite: bool) -> int:
        """Truncate the file to whole windows, or begin a new one. Returns how many pairs it holds.

        Raises:
            ValueError: its header has another identity, and overwrite is off.
        """
        if self.path.exists():
            with self.path.open("r+b") as file:
                if file.readline() == self._header:
                    return self._truncate(file)
            if not overwrite:
                raise ValueError(
                    f"{self.path} holds scores of another model, other data or other options: remove it, or pass "
                    "--overwrite"
                )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_bytes(self._header)
        return 0

    @staticmethod
    def _truncate(file: BinaryIO) -> int:
        """Cut what follows the last whole window, from behind the header. Returns the pairs that are left."""
        end = position = file.tell()
        count = whole = 0
        for line in file:
            position += len(line)
            count += 1
            if count % WINDOW == 0 and line.endswith(b"\n"):
                end, whole = position, count
        file.truncate(end)
        return whole

    def append(self, scores: Iterable[Mapping[str, Any]]) -> None:
        """Append the scores, flushed to the disk after every window."""
        rows = iter(scores)
        with self.path.open("ab") as file:
            while window := list(islice(rows, WINDOW)):
                file.write(b"".join(json.dumps(row).encode() + b"\n" for row in window))
                file.flush()
                os.fsync(file.fileno())

    def __iter__(self) -> Iterator[Row]:
        """The scores of each pair, ascending by row; it takes 16 bytes of memory a pair."""
        rows, places = array("q"), array("q")
        with self.path.open("rb") as file:
            place = len(file.readline())
            for line in file:
                rows.append(json.loads(line)["row"])
                places.append(place)
                place += len(line)
            for index in np.argsort(rows):
                file.seek(places[index])
                yield json.loads(file.readline())


@dataclass(frozen=True)
class SourceRows:
    """The rows of the source, with all their columns.

    Attributes:
        windows: iterates over lists of (number, row), where number is the score's "row".
        schema: their Arrow schema, or None for rows of text files, which have none.
        tables: iterates over these columns by windows, those that a file has; None for rows of text files.
        snapshot: the files as they were before the rows were loaded.
    """

    windows: Callable[[], Iterator[list[tuple[int, Row]]]]
    schema: pa.Schema | None
    tables: Callable[[Sequence[str]], Iterator[Any]] | None
    snapshot: Snapshot


def source_snapshot(source: str, split: str) -> Snapshot:
    """What a source's files hold: taken before they are loaded, since they are read again for the output."""
    return Snapshot.of(source_files(source, split))


def source_rows(source: str, dataset: Dataset, snapshot: Snapshot) -> SourceRows:
    """The rows of a source that load_preferences has loaded as `dataset`.

    Files are read again: the dataset has only the columns that make a pair.

    Raises:
        DataError: they have changed since the snapshot.
    """
    snapshot.check()
    path, files = Path(source), snapshot.paths
    if not files or is_saved(path):
        parts = chunk_bounds(len(dataset), WINDOW)
        schema = dataset.features.arrow_schema.remove_metadata()
        return _of_tables(schema, lambda names: read_chunks(dataset, names, parts), snapshot)
    if kind_of(files[0]) == ".parquet":
        schemas = [pq.read_schema(file).remove_metadata() for file in files]
        schema = schemas[0] if len(schemas) == 1 else pa.unify_schemas(schemas, promote_options="permissive")
        return _of_tables(schema, lambda names: _parquet_tables(files, names), snapshot)
    by_line = path.is_file() and unit_of(path) == "line"
    return SourceRows(lambda: _text_windows(files, by_line=by_line), None, None, snapshot)


def _of_tables(schema: pa.Schema, tables: Callable[[Sequence[str]], Iterator[Any]], snapshot: Snapshot) -> SourceRows:
    def windows() -> Iterator[list[tuple[int, Row]]]:
        start = 0
        for table in tables(schema.names):
            yield list(enumerate(table.to_pylist(), start))
            start += len(table)

    return SourceRows(windows, schema, tables, snapshot)


def _text_windows(files: Sequence[Path], *, by_line: bool) -> Iterator[list[tuple[int, Row]]]:
    """The rows of files of JSON or CSV, numbered as in load_preferences' dataset: by lines, or of a folder by rows."""
    every = (numbered for file in files for numbered in read_rows(file))
    rows = ((number if by_line else index, row) for index, (number, row) in enumerate(every))
    while window := list(islice(rows, WINDOW)):
        # A row that cannot be read was skipped when loading, and has no scores.
        yield [(number, row) for number, row in window if isinstance(row, dict)]


def _parquet_tables(files: Sequence[Path], names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    for file in files:
        with pq.ParquetFile(file) as parquet:
            own = [name for name in names if name in parquet.schema_arrow.names]
            yield from parquet.iter_batches(WINDOW, columns=own)


def check_output(output: Path, source: SourceRows) -> None:
    """Refuse a .jsonl file for rows that hold bytes, as encoded images are. Reads such columns up to the first bytes.

    Raises:
        ValueError: with the column.
    """
    if output.suffix == ".parquet" or source.schema is None or source.tables is None:
        return
    names = [field.name for field in source.schema if field.name not in SCORES and "binary" in str(field.type)]
    for table in source.tables(names) if names else ():
        for name in table.schema.names:
            column = table.column(name)
            if any(map(_holds_bytes, column.chunks if isinstance(column, pa.ChunkedArray) else [column])):
                raise _bytes_in_json(f"column '{name}'")


def _holds_bytes(array: pa.Array) -> bool:
    """Whether an array, or what is nested in it, has bytes that are not null."""
    kind = array.type
    if pa.types.is_struct(kind):
        return any(map(_holds_bytes, array.flatten()))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _holds_bytes(array.flatten())
    is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
    return is_bytes and array.null_count < len(array)


def _bytes_in_json(what: str) -> ValueError:
    return ValueError(
        f"output: {what} holds bytes, such as encoded images, which JSON has no form for: name a file that ends in "
        ".parquet, in which they stay as they are"
    )


def write_scored(output: Path, source: SourceRows, partial: PartialScores) -> None:
    """Write the rows that have scores, with their scores, and remove the partial file.

    Args:
        output: a .jsonl file, or a .parquet file, in which JSON rows get the columns that any of them has, with nulls.
        source: the rows.
        partial: the scores of the rows that could be used.

    Raises:
        ValueError: rows that cannot be stored as Parquet, with the reason, or as JSON (bytes); or files that changed
            since they were loaded (DataError): their rows are not those of the scores. The partial file stays.
    """
    source.snapshot.check()  # the schema is of then; another file's rows would not fit it
    # Hidden, and without a suffix that readers look for.
    aside = output.with_name(f".{output.name}.writing")
    write = _write_parquet if output.suffix == ".parquet" else _write_jsonl
    try:
        write(aside, source, partial)
        source.snapshot.check()
        put(aside, output)
    finally:
        aside.unlink(missing_ok=True)
    partial.path.unlink()


def _joined(source: SourceRows, partial: PartialScores) -> Iterator[list[Row]]:
    """The source's rows that have scores, joined with them, by windows."""
    scores = iter(partial)
    score = next(scores, None)
    for window in source.windows():
        rows = []
        for number, row in window:
            if score is not None and score["row"] == number:
                kept = {name: value for name, value in row.items() if name not in SCORES}
                rows.append(kept | {name: score[name] for name in SCORES if name in score})
                score = next(scores, None)
        if rows:
            yield rows
    if score is not None:
        raise ValueError(f"{partial.path}: has scores of row {score['row']}, which the data has not: remove it")


def _finite(value: Any) -> Any:
    """A value with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json_line(row: Row) -> str:
    try:
        return json.dumps(row, ensure_ascii=False, default=_as_text, allow_nan=False) + "\n"
    except ValueError:
        return json.dumps(_finite(row), ensure_ascii=False, default=_as_text) + "\n"


def _as_text(value: Any) -> str:
    """A value that JSON has no type for (a date, from Parquet)."""
    if isinstance(value, (bytes, bytearray)):
        raise _bytes_in_json("a row")
    return str(value)


def _write_jsonl(path: Path, source: SourceRows, partial: PartialScores) -> None:
    with path.open("w", encoding="utf-8") as file:
        for rows in _joined(source, partial):
            file.writelines(map(_json_line, rows))


def _write_parquet(path: Path, source: SourceRows, partial: PartialScores) -> None:
    try:
        if source.schema is None:
            parts = (pa.Table.from_pylist(rows).schema for rows in _joined(source, partial))
            schema = pa.unify_schemas(parts, promote_options="permissive")
        else:
            added = pa.Table.from_pylist([next(iter(partial))]).schema
            kept = [field for field in source.schema if field.name not in SCORES]
            schema = pa.schema([*kept, *(added.field(name) for name in SCORES if name in added.names)])
        with pq.ParquetWriter(path, schema) as writer:
            for rows in _joined(source, partial):
                writer.write_table(pa.Table.from_pylist(rows, schema))
    except pa.ArrowException as error:
        raise ValueError(f"output: these rows have no place in a Parquet file: {error}; write .jsonl") from error


def weights_of(model: str | None) -> list[Any]:
    """What identifies a model's weights without reading them: name, size and mtime of the files of its folder."""
    folder = Path(model) if model else None
    if folder is None or not folder.is_dir():
        return [model]
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json"))
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
