"""load_preferences: preference data from a file, a folder or the Hugging Face hub, as a memory-mapped datasets.Dataset.

JSON lines are parsed here rather than by datasets' reader, whose errors name no line and which gives every turn of a
conversation the keys of all turns. Here an error names the line number, and turns, tools and template variables are
returned as they are in the file. For every source the rows are in an Arrow file that is memory-mapped.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Features, Json, List, Value

from dpofast.common.atomic_files import put
from dpofast.data import formats
from dpofast.data.arrow import mapped_files
from dpofast.data.formats import TEMPLATE_COLUMNS, BadRow, DataError
from dpofast.data.tokenize_pairs import (
    ERROR,
    LINE,
    DataReport,
    Skipped,
    check_on_bad_row,
    no_usable_row,
    tokenize_preferences,
)

__all__ = ["DataError", "DataReport", "Skipped", "load_preferences", "tokenize_preferences"]

_FEATURES = {
    "text": Value("string"),
    # Turns are stored as JSON: a struct column would give every turn the keys of all turns.
    "messages": List(Json()),
    "ids": List(Value("int64")),
    "number": Value("float64"),
    "json": Json(),
}
_ARRAY = "expected one object a line, got an array; `jq -c '.[]' file.json > file.jsonl` writes its elements so"
_PARQUET_ROWS, _BUFFER_BYTES = 1000, 1 << 20
_HALF_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_FILE_SUFFIX = re.compile(r"\.[a-zA-Z]+$")
_CODE = Path(__file__).read_bytes() + Path(formats.__file__).read_bytes()


def load_preferences(
    source: str | os.PathLike[str],
    *,
    split: str = "train",
    on_bad_row: str = "raise",
    cache_dir: str | None = None,
) -> Dataset:
    """Load preference data; the row formats are listed in dpofast.data.formats.

    Args:
        source: a .jsonl or .json file with one JSON object a line, a .parquet file, a folder written by save_to_disk,
            or the name of a dataset on the Hugging Face hub.
        split: split of a saved DatasetDict or of a hub dataset. Files and saved datasets have one split, "train".
        on_bad_row: used for JSON lines only. With "skip", a line that cannot be read becomes a row of nulls with the
            reason in column `_error`; tokenize_preferences counts and drops it.
        cache_dir: folder of datasets' Arrow files; None: datasets' default.

    Returns:
        A Dataset. From JSON lines it has the columns of a preference pair and `_line`, the line number from 1.

    Raises:
        DataError: the source is missing, empty or unreadable, lacks a column, or (JSON lines) has a bad line and
            on_bad_row is "raise".
        ValueError: an option out of range.
    """
    check_on_bad_row(on_bad_row)
    name, path = os.fspath(source), Path(source)
    if path.is_dir():
        dataset = _load_folder(path, split)
    elif path.exists():
        if split != "train":
            raise DataError(f"{name}: a file is one split, called 'train'; got split={split!r}")
        if path.suffix == ".parquet":
            dataset = _load_parquet(path, cache_dir)
        elif path.suffix in (".jsonl", ".json"):
            dataset = _load_jsonl(path, on_bad_row == "skip", cache_dir)
        else:
            raise DataError(f"{name}: expected a file that ends in .jsonl, .json or .parquet, got {path.suffix!r}")
    elif _HUB_NAME.fullmatch(name) and not _FILE_SUFFIX.search(name):
        dataset = _load_hub(name, split, cache_dir)
    else:
        raise DataError(f"{name}: no such file or folder")
    if len(dataset) == 0:
        raise DataError(f"{name}: there are no rows")
    try:
        formats.used_columns(dataset.column_names)
    except BadRow as problem:
        raise DataError(f"{name}: {problem}") from None
    # tokenize_preferences reads the name for its messages from here.
    dataset.info.dataset_name = name
    return dataset


def _load_folder(path: Path, split: str) -> Dataset:
    try:
        saved = datasets.load_from_disk(str(path))
    except FileNotFoundError:
        files = ", ".join(sorted(file.name for file in path.iterdir())[:5]) or "nothing"
        raise DataError(f"{path}: no dataset written by save_to_disk; name a file (the folder holds {files})") from None
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise DataError(f"{path}: the saved dataset cannot be read: {_first_line(error)}") from error
    splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
    if split not in splits:
        raise DataError(f"{path}: no split {split!r}; it has {', '.join(map(repr, splits))}")
    dataset = splits[split]
    # Later passes look up their cached results by this fingerprint. The saved one does not change if an Arrow file is
    # replaced.
    dataset._fingerprint = _content(map(Path, mapped_files(dataset)))
    return dataset


def _load_hub(name: str, split: str, cache_dir: str | None) -> Dataset:
    try:
        return datasets.load_dataset(name, split=split, cache_dir=cache_dir)
    # Network, hub and file-format errors are raised as exceptions of several libraries.
    except Exception as error:
        raise DataError(
            f"{name}: no such file or folder, and not loaded as a dataset of that name from the hub (split {split!r}):"
            f" {type(error).__name__}: {_first_line(error)}"
        ) from error


def _load_parquet(path: Path, cache_dir: str | None) -> Dataset:
    """Convert a Parquet file to an Arrow file named by a hash of its content, and map that.

    datasets' own reader holds whole row groups in memory and detects changes by time stamp.
    """
    try:
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES)
        # datasets fails on a file without rows.
        if file.metadata.num_rows == 0:
            return Dataset.from_dict({})
        folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE, "dpofast-parquet")
        rows = folder / f"{_content([path])}.arrow"
        if not rows.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _copy_rows(file, rows)
        return Dataset.from_file(str(rows))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable Parquet file: {_first_line(error)}") from error


def _copy_rows(file: pq.ParquetFile, target: Path) -> None:
    """Write a Parquet file's rows to an Arrow file atomically."""
    aside = target.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        with open(aside, "wb") as sink:
            with pa.ipc.new_stream(sink, file.schema_arrow) as stream:
                for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                    stream.write_batch(batch)
        put(aside, target)
    finally:
        aside.unlink(missing_ok=True)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]


def _content(files: Iterable[Path], more: bytes = b"") -> str:
    """SHA-256 of `more` and the files' contents, 32 hex digits; time stamps may be too coarse to show a change."""
    content = hashlib.sha256(more)
    for path in files:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                content.update(block)
    return content.hexdigest()[:32]


def _load_jsonl(path: Path, skip: bool, cache_dir: str | None) -> Dataset:
    try:
        content = _content([path], _CODE + bytes([skip]))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    kinds = _first_kinds(path, skip)
    # Template columns may first appear after the first row.
    late = dict.fromkeys(TEMPLATE_COLUMNS, "json") if kinds.get("chosen") == "messages" else {}
    features = {column: _FEATURES[kind] for column, kind in (kinds | late).items()}
    try:
        dataset = Dataset.from_generator(
            _rows,
            features=Features({**features, LINE: Value("int64"), ERROR: Value("string")}),
            gen_kwargs={"path": path, "kinds": kinds, "columns": tuple(features), "skip": skip},
            cache_dir=cache_dir,
            fingerprint=content,
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise DataError(str(error.__cause__)) from None
        raise DataError(f"{path}: cannot be stored as Arrow: {_first_line(error.__cause__ or error)}") from error
    unused = [c for c in (*late, ERROR) if dataset.data.column(c).null_count == len(dataset)]
    return dataset.remove_columns(unused)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield number, line


def _first_kinds(path: Path, skip: bool) -> dict[str, str]:
    """Return the kind of each column (formats.row_kinds) in the first valid line."""
    bad: dict[str, list[int]] = {}
    for number, line in _lines(path):
        try:
            return _parse(line)[1]
        except BadRow as problem:
            if not skip:
                raise DataError(f"{path}, {formats.place('line', number)}: {problem}") from None
            bad.setdefault(problem.reason, []).append(number)
    if not bad:
        raise DataError(f"{path}: there are no rows")
    raise no_usable_row(DataReport.from_bad_rows(str(path), "line", sum(map(len, bad.values())), bad))


def _rows(path: Path, kinds: dict[str, str], columns: tuple[str, ...], skip: bool) -> Iterator[dict[str, Any]]:
    for number, line in _lines(path):
        stored: dict[str, Any] = {**dict.fromkeys(columns), LINE: number, ERROR: None}
        try:
            row, found = _parse(line)
            for column in (*kinds, *found):
                if column not in TEMPLATE_COLUMNS and kinds.get(column) != found.get(column):
                    raise BadRow(
                        f"column '{column}' differs from the first row's",
                        f"expected {kinds.get(column, 'no such column')}, got {found.get(column, 'no such column')}",
                    )
        except BadRow as problem:
            if not skip:
                raise DataError(f"{path}, {formats.place('line', number)}: {problem}") from None
            yield stored | {ERROR: problem.reason}
        else:
            yield stored | {column: _storable(row[column], found[column]) for column in columns if column in row}


def _storable(value: Any, kind: str) -> Any:
    # Json columns accept JSON text; datasets' own encoder would round numbers to ten digits.
    if kind == "messages":
        return [json.dumps(turn) for turn in value]
    if kind == "json" and not isinstance(value, str):
        return json.dumps(value)
    return value


def _parse(line: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """Parse one line into its row, without nulls, and the kind of each column. Raises BadRow."""
    try:
        text = line.decode("utf-8").rstrip()
        row = json.loads(text)
    except UnicodeDecodeError as error:
        raise BadRow("not UTF-8", f"byte {error.start + 1} of the line is 0x{line[error.start]:02x}") from None
    except json.JSONDecodeError as error:
        if text.startswith("["):
            raise BadRow("not a JSON object", _ARRAY) from None
        is_cut = error.pos >= len(text) or error.msg.startswith("Unterminated string")
        detail = "the line ends before its object does" if is_cut else f"{error.msg} at character {error.pos + 1}"
        raise BadRow("not valid JSON", detail) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets nested too deep
        raise BadRow("not valid JSON", str(error)) from None
    if isinstance(row, list):
        raise BadRow("not a JSON object", _ARRAY)
    if not isinstance(row, dict):
        raise BadRow("not a JSON object", f"expected one object a line, got {type(row).__name__}")
    if _HALF_SURROGATE.search(line):
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadRow("half of a surrogate pair", "\\ud800 to \\udfff alone is no character") from None
    row = {column: value for column, value in row.items() if value is not None}
    return row, formats.row_kinds(row, formats.used_columns(row))
