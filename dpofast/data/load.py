"""load_preferences: preference data from a file, a folder or the Hugging Face hub, as a memory-mapped datasets.Dataset.

JSON and CSV are parsed by read_rows.py rather than by datasets' readers. For every source the rows are in an Arrow file
that is memory-mapped.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Features, Image, Json, List, Value

from dpofast.common.atomic_files import put
from dpofast.common.hub import check_hub_name, nearest_path
from dpofast.data import columns, files, formats, read_rows
from dpofast.data.arrow import check_batch, check_values, mapped_files
from dpofast.data.files import Snapshot, kind_of, open_source
from dpofast.data.formats import LIST_WEIGHT_COLUMN, TEMPLATE_COLUMNS, WEIGHT_COLUMNS, BadRow, DataError
from dpofast.data.images import decode, stored
from dpofast.data.images.columns import IMAGES, ROW_IMAGES
from dpofast.data.report import DataReport, NoUsableRow, Skipped, bad_rows
from dpofast.data.tokenize_pairs import DETAIL, ERROR, FILE, LINE, check_on_bad_row, tokenize_preferences

__all__ = ["DataError", "DataReport", "Skipped", "load_preferences", "tokenize_preferences"]

_FEATURES = {
    "text": Value("string"),
    # Turns are stored as JSON: a struct column would give every turn the keys of all turns.
    "messages": List(Json()),
    "ids": List(Value("int64")),
    "number": Value("float64"),
    "json": Json(),
    "numbers": List(Value("float64")),
    "texts": List(Value("string")),
    "conversations": List(List(Json())),
    "lists of ids": List(List(Value("int64"))),
    "lists of numbers": List(List(Value("float64"))),
    "images": List(Image()),
    "image": Image(),
}
_PARQUET_ROWS, _BATCH_BYTES, _BUFFER_BYTES = 1000, 1 << 26, 1 << 20
_HUB_NAME = re.compile(r"([\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?::([\w.-]+))?")
_FILE_SUFFIX = re.compile(r"\.[a-zA-Z]+$")
_IMAGE_NAMES = (b"image", rb"\u006", rb"\u007")  # the last two begin its letters where they are escaped
_CODE = (
    b"".join(Path(str(module.__file__)).read_bytes() for module in (columns, files, formats, read_rows, decode, stored))
    + Path(__file__).read_bytes()
)


def load_preferences(
    source: str | os.PathLike[str],
    *,
    split: str = "train",
    on_bad_row: str = "raise",
    cache_dir: str | None = None,
) -> Dataset:
    """Load preference data; the row formats are listed in dpofast.data.formats.

    Args:
        source: a file that ends in .jsonl, .json (one JSON object a line, or one array of them), .csv or .tsv, each
            also with .gz, or .parquet; a folder of such files, or one written by save_to_disk; or the name of a dataset
            on the Hugging Face hub, "name" or "name:config".
        split: split of a saved DatasetDict, of a hub dataset, or of a folder whose file names say it. Files and saved
            datasets have one split, "train".
        on_bad_row: used for JSON and CSV. With "skip", a row that cannot be read becomes a row of nulls with the
            reason in column `_error`; tokenize_preferences counts and drops it.
        cache_dir: folder of datasets' Arrow files; None: datasets' default.

    Returns:
        A Dataset. From JSON and CSV it has the columns of a pair or a list and, but for an array, `_line`, the line
        number from 1; from several files also `_file`.

    Raises:
        DataError: the source is missing, empty, unreadable or changes meanwhile, lacks a column, or (JSON, CSV) has bad
            rows and on_bad_row is "raise"; then all are counted, and the first five named.
        ValueError: an option out of range.
    """
    check_on_bad_row(on_bad_row)
    name, path = os.fspath(source), Path(source)
    if path.is_dir():
        dataset = _load_folder(path, split, on_bad_row == "skip", cache_dir)
    elif os.path.lexists(path):
        if split != "train":
            raise DataError(f"{name}: a file is one split, called 'train'; got split={split!r}")
        if kind_of(path) not in files.SUFFIXES:
            raise DataError(
                f"{name}: expected a file that ends in {', '.join(files.SUFFIXES)} (or in .gz after it), got "
                f"{path.suffix!r}"
            )
        dataset = _load_file(path, on_bad_row == "skip", cache_dir)
    elif _HUB_NAME.fullmatch(name) and not _FILE_SUFFIX.search(name):
        dataset = _load_hub(name, split, cache_dir)
    else:
        raise DataError(f"{name}: no such file or folder{_nearest(name)}")
    if len(dataset) == 0:
        raise DataError(f"{name}: there are no rows")
    try:
        formats.used_columns(dataset.column_names)
    except BadRow as problem:
        raise DataError(f"{name}: {problem}") from None
    # tokenize_preferences reads the name for its messages from here.
    dataset.info.dataset_name = name
    return dataset


def source_files(source: str | os.PathLike[str], split: str) -> list[Path]:
    """Return the files that a source's rows are in; none of a dataset of the hub, whose files are datasets' own."""
    path = Path(source)
    if path.is_dir():
        return sorted(path.rglob("*.arrow")) if is_saved(path) else files.shards(path, split)
    return [path] if os.path.lexists(path) else []


def _nearest(name: str) -> str:
    near = nearest_path(name)
    return f"; did you mean {near}?" if near else ""


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by save_to_disk."""
    return any((folder / name).exists() for name in ("state.json", "dataset_dict.json"))


def _load_file(path: Path, skip: bool, cache_dir: str | None) -> Dataset:
    files.check_regular(path)
    return _load_parquet(path, cache_dir) if kind_of(path) == ".parquet" else _load_text(path, skip, cache_dir)


def _load_folder(path: Path, split: str, skip: bool, cache_dir: str | None) -> Dataset:
    if is_saved(path):
        return _load_saved(path, split)
    parts = []
    for shard in files.shards(path, split):
        part = _load_file(shard, skip, cache_dir)
        parts.append(part.add_column(FILE, pa.array([shard.name] * len(part), pa.string())) if len(part) else part)
    parts = [part for part in parts if len(part)]
    if not parts:
        raise DataError(f"{path}: there are no rows")
    try:
        return datasets.concatenate_datasets(parts)
    except (ValueError, TypeError, pa.ArrowException) as error:
        raise DataError(f"{path}: its files' columns differ in type: {_first_line(error)}") from error


def _load_saved(path: Path, split: str) -> Dataset:
    for file in path.rglob("*"):
        if not file.is_dir():
            files.check_regular(file)
    snapshot = Snapshot.of(map(Path, mapped_files(_saved_split(path, split))))
    # Mapped anew, so that what is mapped is what was hashed, or the check finds another file.
    dataset = _saved_split(path, split)
    check_values(dataset, str(path))
    snapshot.check()
    # Later passes look up their cached results by this fingerprint. The saved one does not change if an Arrow file is
    # replaced.
    dataset._fingerprint = snapshot.digest
    return dataset


def _saved_split(path: Path, split: str) -> Dataset:
    try:
        saved = datasets.load_from_disk(str(path))
    # What is wrong with the JSON beside the Arrow files is raised as exceptions of many kinds.
    except Exception as error:
        raise DataError(
            f"{path}: the saved dataset cannot be read: {type(error).__name__}: {_first_line(error)}"
        ) from error
    splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
    if split not in splits:
        raise DataError(f"{path}: no split {split!r}; it has {', '.join(map(repr, splits))}")
    return splits[split]


def _load_hub(name: str, split: str, cache_dir: str | None) -> Dataset:
    match = _HUB_NAME.fullmatch(name)
    assert match is not None
    repository, config = match.groups()

    def cached(repository: str) -> bool:
        return Path(cache_dir or datasets.config.HF_DATASETS_CACHE, repository.replace("/", "___").lower()).is_dir()

    try:
        check_hub_name(repository, kind="dataset", cached=cached)
    except ValueError as problem:
        raise DataError(str(problem)) from None
    options: dict[str, Any] = {"name": config} if config else {}
    try:
        return datasets.load_dataset(repository, split=split, cache_dir=cache_dir, **options)
    # Network, hub and file-format errors are raised as exceptions of several libraries.
    except Exception as error:
        raise DataError(
            f"{name}: no such file or folder, and not loaded as a dataset of that name from the hub (split {split!r}):"
            f" {type(error).__name__}: {_first_line(error)}{_nearest(name)}"
        ) from error


def _load_parquet(path: Path, cache_dir: str | None) -> Dataset:
    """Convert a Parquet file to an Arrow file named by a hash of its content, and map that.

    datasets' own reader holds whole row groups in memory and detects changes by time stamp.
    """
    try:
        snapshot = Snapshot.of([path])
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file:
            formats.check_once(file.schema_arrow.names)
            # datasets fails on a file without rows.
            if file.metadata.num_rows == 0:
                return Dataset.from_dict({})
            folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE, "dpofast-parquet")
            rows = folder / f"{_digest(file.schema_arrow, snapshot)}.arrow"
            if not rows.exists():
                folder.mkdir(parents=True, exist_ok=True)
                _copy_rows(file, rows, snapshot)
        return Dataset.from_file(str(rows))
    except BadRow as problem:
        raise DataError(f"{path}: {problem}") from None
    except DataError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable Parquet file: {_first_line(error)}") from error


def _digest(schema: pa.Schema, snapshot: Snapshot) -> str:
    """A hash of a Parquet file's content and, where it has images, of the folder that their paths are relative to."""
    if not {*schema.names} & {*ROW_IMAGES}:
        return snapshot.digest
    folder = os.fsencode(snapshot.paths[0].parent.absolute())
    return hashlib.sha256(snapshot.digest.encode() + folder).hexdigest()[:32]


def _copy_rows(file: pq.ParquetFile, target: Path, snapshot: Snapshot) -> None:
    """Write a Parquet file's rows to an Arrow file atomically."""
    aside = target.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        with open(aside, "wb") as sink:
            with pa.ipc.new_stream(sink, file.schema_arrow) as stream:
                start = 0
                groups = [file.metadata.row_group(at) for at in range(file.metadata.num_row_groups)]
                row_bytes = sum(group.total_byte_size for group in groups) // file.metadata.num_rows
                rows = max(1, min(_PARQUET_ROWS, _BATCH_BYTES // max(row_bytes, 1)))
                for batch in file.iter_batches(batch_size=rows):
                    check_batch(batch, start, str(snapshot.paths[0]))
                    stream.write_batch(_with_folder(batch, snapshot.paths[0].parent))
                    start += len(batch)
        snapshot.check()
        put(aside, target)
    finally:
        aside.unlink(missing_ok=True)


def _with_folder(batch: pa.RecordBatch, folder: Path) -> pa.RecordBatch:
    """Rows whose images have no relative paths."""
    arrays = [
        stored.with_folder(array, folder) if name in ROW_IMAGES else array
        for name, array in zip(batch.schema.names, batch.columns, strict=True)
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=batch.schema)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]


def _load_text(path: Path, skip: bool, cache_dir: str | None) -> Dataset:
    folder = os.fsencode(path.parent.absolute()) if _may_hold_images(path) else b""
    snapshot = Snapshot.of([path], _CODE + bytes([skip]) + folder)
    kinds = _first_kinds(path, skip)
    # These columns may first appear after the first row.
    is_list, texts = formats.holds_list(kinds), kinds.get("chosen", kinds.get("responses"))
    late = dict.fromkeys(TEMPLATE_COLUMNS, "json") if texts in ("messages", "conversations") else {}
    late |= {column: column for column in ROW_IMAGES if folder}
    if texts is not None:
        late |= dict.fromkeys(sorted(formats.context_columns()), "json")
    late |= {LIST_WEIGHT_COLUMN: "lists of numbers"} if is_list else dict.fromkeys(WEIGHT_COLUMNS, "numbers")
    features = {column: _FEATURES[kind] for column, kind in (kinds | late).items()}
    try:
        dataset = Dataset.from_generator(
            _rows,
            features=Features({**features, LINE: Value("int64"), ERROR: Value("string"), DETAIL: Value("string")}),
            gen_kwargs={"path": path, "kinds": kinds, "columns": tuple(features), "skip": skip, "snapshot": snapshot},
            cache_dir=cache_dir,
            fingerprint=snapshot.digest,
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise DataError(str(error.__cause__)) from None
        raise DataError(f"{path}: cannot be stored as Arrow: {_first_line(error.__cause__ or error)}") from error
    unused = [c for c in (*late, ERROR, DETAIL) if dataset.data.column(c).null_count == len(dataset)]
    if read_rows.unit_of(path) == "row":
        unused.append(LINE)
    return dataset.remove_columns(unused)


def _may_hold_images(path: Path) -> bool:
    """Whether the name of a column of images stands anywhere in a file, perhaps with escaped letters."""
    end = b""
    try:
        with open_source(path) as file:
            while block := file.read(1 << 20):
                if any(name in end + block for name in _IMAGE_NAMES):
                    return True
                end = block[-4:]
    except (OSError, EOFError, zlib.error):
        pass  # said by whoever reads it
    return False


def _first_kinds(path: Path, skip: bool) -> dict[str, str]:
    """Return the kind of each column (columns.row_kinds) in the first valid row."""
    bad: dict[str, list[int]] = {}
    details = []
    unit = read_rows.unit_of(path)
    for number, row in read_rows.read_rows(path):
        try:
            return _kinds(row)
        except BadRow as problem:
            bad.setdefault(problem.reason, []).append(number)
            details.append(f"{formats.place(unit, number)}: {problem}")
    if not bad:
        raise DataError(f"{path}: there are no rows")
    if not skip:
        raise bad_rows(str(path), len(details), details)
    raise NoUsableRow(DataReport.from_bad_rows(str(path), unit, sum(map(len, bad.values())), bad))


def _kinds(row: read_rows.Row | BadRow) -> dict[str, str]:
    if isinstance(row, BadRow):
        raise row
    found = {column: value for column, value in row.items() if value is not None}
    return columns.row_kinds(found, formats.used_columns(found))


def _rows(
    path: Path, kinds: dict[str, str], columns: tuple[str, ...], skip: bool, snapshot: Snapshot
) -> Iterator[dict[str, Any]]:
    unit, total = read_rows.unit_of(path), 0
    details: list[str] = []
    for number, row in read_rows.read_rows(path):
        total += 1
        values: dict[str, Any] = {**dict.fromkeys(columns), LINE: number, ERROR: None, DETAIL: None}
        try:
            found = _kinds(row)
            for column in (*kinds, *found):
                if not formats.is_optional(column) and kinds.get(column) != found.get(column):
                    raise BadRow(
                        f"column '{column}' differs from the first row's",
                        f"expected {kinds.get(column, 'no such column')}, got {found.get(column, 'no such column')}",
                    )
            assert isinstance(row, dict)
            values |= {
                column: _storable(column, row[column], found[column], path.parent)
                for column in columns
                if column in found
            }
        except BadRow as problem:
            if not skip:
                details.append(f"{formats.place(unit, number)}: {problem}")
                continue
            values |= {ERROR: problem.reason, DETAIL: str(problem)}
        if not details:
            yield values
    if details:
        raise bad_rows(str(path), total, details)
    snapshot.check()


def _storable(column: str, value: Any, kind: str, folder: Path) -> Any:
    if kind in ROW_IMAGES:
        images = stored.stored(value, folder)
        return images if kind == IMAGES else images[0] if images else None
    # Json columns accept JSON text; datasets' own encoder would round numbers to ten digits.
    try:
        if kind == "messages":
            return [json.dumps(turn, allow_nan=False) for turn in value]
        if kind == "conversations":
            return [[json.dumps(turn, allow_nan=False) for turn in turns] for turns in value]
        if column in WEIGHT_COLUMNS:  # which may be booleans
            return columns.token_weights(column, value)
        if column == LIST_WEIGHT_COLUMN:
            return [None if weights is None else columns.token_weights(column, weights) for weights in value]
        if kind == "json" and not (isinstance(value, str) and column == "tools"):
            return json.dumps(value, allow_nan=False)
    except ValueError:  # NaN and Infinity, which JSON does not have and Python reads
        raise BadRow(f"column '{column}' holds a number that is not finite", "a template would write it") from None
    return value
