"""Read a memory-mapped dataset in chunks of rows, and release the pages of each chunk after it was used.

The rows of an Arrow file are memory-mapped: pages that were read stay resident until the kernel needs the memory, so
one pass over a large file makes the process look that large, also to a container's memory limit. Released pages stay
in the kernel's page cache and are mapped again when touched.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def mapped_files(dataset: Dataset) -> tuple[str, ...]:
    """Real paths of the Arrow files that hold a dataset's rows; empty for a dataset in memory."""
    return tuple(sorted({os.path.realpath(file["filename"]) for file in dataset.cache_files}))


def release_pages(files: Collection[str]) -> None:
    """Unmap the pages of these files from this process, as far as they were only read. Outside Linux nothing happens.

    Tables over the files stay valid: what is touched again is mapped again.
    """
    if _LIBC is None or not files:
        return
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            # 7f10a0000000-7f10a4000000 r--p 00000000 08:01 131 /a/file: a page that cannot be written cannot be lost
            fields = line.rstrip("\n").split(maxsplit=5)
            if len(fields) == 6 and fields[1].startswith("r--") and fields[5] in files:
                start, stop = (int(bound, 16) for bound in fields[0].split("-"))
                _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), ctypes.c_int(mmap.MADV_DONTNEED))


def chunk_bounds(count: int, size: int) -> list[tuple[int, int]]:
    """(start, stop) of every chunk of at most `size` rows, out of `count`."""
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def read_chunks(dataset: Dataset, columns: Collection[str], bounds: Iterable[tuple[int, int]]) -> Iterator[pa.Table]:
    """The columns of every chunk (start, stop) of rows, as Arrow tables; a table's pages are released with the next."""
    files = mapped_files(dataset)
    rows: Any = dataset.with_format("arrow", columns=list(columns))
    for start, stop in bounds:
        yield rows[start:stop]
        release_pages(files)
