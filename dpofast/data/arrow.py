"""Read a memory-mapped dataset in chunks of rows, and release the pages of each chunk after use.

Pages of a mapped Arrow file stay resident after they were read until the kernel needs the memory. One pass over a large
file therefore adds its size to the process's resident memory, which also counts towards a container's memory limit.
Released pages stay in the kernel's page cache and are mapped again on access.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import uuid
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset
from datasets.fingerprint import Hasher, get_temporary_cache_files_directory

from dpofast.data.formats import DataError

_GATHERED = 32  # rows that are copied before their pages are released
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def mapped_files(dataset: Dataset) -> tuple[str, ...]:
    """Return the real paths of the Arrow files that hold a dataset's rows; empty for a dataset in memory."""
    return tuple(sorted({os.path.realpath(file["filename"]) for file in dataset.cache_files}))


def release_pages(files: Collection[str]) -> None:
    """Unmap the pages of read-only mappings of these files from this process. Does nothing outside Linux.

    Tables over the files stay valid: pages are mapped again on access.
    """
    if _LIBC is None or not files:
        return
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            # 7f10a0000000-7f10a4000000 r--p 00000000 08:01 131 /a/file: read-only, so dropping pages loses no data
            fields = line.rstrip("\n").split(maxsplit=5)
            if len(fields) == 6 and fields[1].startswith("r--") and fields[5] in files:
                start, stop = (int(bound, 16) for bound in fields[0].split("-"))
                _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), ctypes.c_int(mmap.MADV_DONTNEED))


def chunk_bounds(count: int, size: int) -> list[tuple[int, int]]:
    """Return (start, stop) of every chunk of at most `size` rows, out of `count`."""
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def read_chunks(dataset: Dataset, columns: Collection[str], bounds: Iterable[tuple[int, int]]) -> Iterator[pa.Table]:
    """Yield the columns of every chunk (start, stop) of rows as an Arrow table.

    A table's pages are released when the next one is requested. Rows that are scattered over the file (those of select
    or shuffle) are copied.

    Raises:
        DataError: the dataset has a transform (set_transform), which would be passed by.
    """
    if dataset.format["type"] == "custom":
        raise DataError(
            "expected a dataset of stored rows, got one with a transform: apply it with map, or tokenize it"
        )
    files = mapped_files(dataset)
    rows: Any = dataset.with_format("arrow", columns=list(columns))
    for start, stop in bounds:
        yield rows[start:stop] if dataset._indices is None else _gathered(rows, start, stop, files)
        release_pages(files)


def _gathered(rows: Any, start: int, stop: int, files: Collection[str]) -> pa.Table:
    """A copy of rows that are scattered over the files: the kernel maps the 64 KB around each one that is read."""
    parts = []
    for first, last in chunk_bounds(stop - start, _GATHERED):
        parts.append(rows[start + first : start + last].combine_chunks())
        release_pages(files)
    return pa.concat_tables(parts)


def check_values(dataset: Dataset, source: str) -> None:
    """Check the Arrow buffers of a mapped dataset: offsets inside their buffers, text that is UTF-8.

    Arrow trusts a file that it maps: one damaged offset would be read from anywhere in memory, or end the process.

    Raises:
        DataError: a buffer is damaged; names the first rows of the batch that it is in.
    """
    files = mapped_files(dataset)
    start = 0
    for batch in dataset.data.table.to_batches():
        check_batch(batch, start, source)
        start += len(batch)
        release_pages(files)


def check_batch(batch: pa.RecordBatch, start: int, source: str) -> None:
    """Raise DataError, naming the batch's rows from `start` on, where one of its buffers is damaged."""
    try:
        batch.validate(full=True)
    except pa.ArrowException as error:
        rows, reason = f"rows {start} to {start + len(batch) - 1}", " ".join(str(error).split())
        raise DataError(f"{source}: damaged Arrow data in {rows}: {reason}") from error


def is_cached(dataset: Dataset) -> bool:
    """Whether a dataset lies in memory, or in files that datasets or load_preferences wrote as a cache."""
    cache = Path(datasets.config.HF_DATASETS_CACHE).resolve()
    folders = {Path(file).parent for file in mapped_files(dataset)}
    return all(
        folder.is_relative_to(cache)
        or folder.name == "dpofast-parquet"
        or ((folder / "dataset_info.json").exists() and not (folder / "state.json").exists())
        for folder in folders
    )


def cache_options(dataset: Dataset, function: Any) -> dict[str, Any]:
    """Options of Dataset.map that keep its result out of folders that are the user's own, which may be read-only.

    datasets writes it beside the files that it came from.
    """
    if is_cached(dataset):
        return {}
    key = Hasher.hash((dataset._fingerprint, function))
    folder = Path(datasets.config.HF_DATASETS_CACHE, "dpofast-tokens")
    folder.mkdir(parents=True, exist_ok=True)
    return {"cache_file_name": str(folder / f"{key}.arrow"), "new_fingerprint": key}


def uncached_options(dataset: Dataset) -> dict[str, Any]:
    """Options of Dataset.map that write its result anew, into a folder that is removed when the process ends.

    Of a dataset in memory, datasets keeps no results.
    """
    if not dataset.cache_files:
        return {}
    key = uuid.uuid4().hex
    folder = get_temporary_cache_files_directory()
    return {"cache_file_name": os.path.join(folder, f"{key}.arrow"), "new_fingerprint": key}
