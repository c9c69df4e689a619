"""Source files: regular files only, opened with or without gzip, and checked not to change while they are read."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from dpofast.data.formats import DataError

TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet")
_GZIP = ".gz"
# Files of JSON that describe a dataset and hold none of its rows.
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
# Words by which datasets tells the splits of a folder's files apart.
_SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("validation", "valid", "val", "dev"),
}


def kind_of(path: Path) -> str:
    """Return the suffix that says how a file is read, without .gz."""
    name = path.name.removesuffix(_GZIP) if path.name.endswith(tuple(s + _GZIP for s in TEXT_SUFFIXES)) else path.name
    return Path(name).suffix


def check_regular(path: Path) -> None:
    """Raise DataError for what would block or never end when it is read: a pipe, a device, a socket."""
    if not path.exists():
        raise DataError(f"{path}: no such file; it is a link to one that is missing")
    if not path.is_file():
        raise DataError(
            f"{path}: expected a regular file, got a pipe, a device or a socket, which cannot be read twice: write the "
            "rows into a file"
        )


def open_source(path: Path) -> IO[bytes]:
    """Open a file for reading bytes, through gzip where its name ends in .gz."""
    return cast(IO[bytes], gzip.open(path, "rb")) if path.name.endswith(_GZIP) else open(path, "rb")


@dataclass(frozen=True)
class Snapshot:
    """What files hold at a time, by their contents and their stamps.

    Attributes:
        paths: the files.
        digest: SHA-256 of their contents, 32 hex digits; time stamps may be too coarse to show a change.
        stamps: inode, size and time of each: a file that was exchanged twice has its contents again, and not these.
        more: what else went into the digest.
    """

    paths: tuple[Path, ...]
    digest: str
    stamps: tuple[tuple[int, ...], ...]
    more: bytes = b""

    @classmethod
    def of(cls, paths: Iterable[Path], more: bytes = b"") -> Snapshot:
        """Read the files; `more` goes into the digest too. Raises DataError where one cannot be read."""
        files = tuple(paths)
        digest = hashlib.sha256(more)
        for path in files:
            check_regular(path)
            try:
                with open(path, "rb") as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        return cls(files, digest.hexdigest()[:32], _stamps(files), more)

    def check(self) -> None:
        """Raise DataError where a file is no longer the one that was read."""
        try:
            same = _stamps(self.paths) == self.stamps and Snapshot.of(self.paths, self.more).digest == self.digest
        except (OSError, DataError):
            same = False
        if not same:
            names = ", ".join(map(str, self.paths[:3])) + (", ..." if len(self.paths) > 3 else "")
            raise DataError(f"{names}: changed while it was read; let the file be, and run again")


def _stamps(paths: Iterable[Path]) -> tuple[tuple[int, ...], ...]:
    found = [os.stat(path) for path in paths]
    return tuple((stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in found)


def shards(folder: Path, split: str) -> list[Path]:
    """Return a folder's data files of a split, sorted by name.

    Where file names say a split (train-00000-of-00002.parquet, test.jsonl), only those of `split` are taken; where none
    does, all of them are "train".

    Raises:
        DataError: no data files, files of several kinds, or none of the split.
    """
    files = sorted(
        path
        for path in folder.iterdir()
        if kind_of(path) in SUFFIXES and path.name not in _METADATA and not path.name.startswith((".", "_"))
    )
    if not files:
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise DataError(
            f"{folder}: no dataset written by save_to_disk, and no file that ends in {', '.join(SUFFIXES)} (the folder "
            f"holds {held})"
        )
    named = {path: _split_of(path) for path in files}
    present = sorted({name or "train" for name in named.values()})
    files = [path for path in files if (named[path] or "train") == split]
    if not files:
        raise DataError(f"{folder}: no split {split!r}; its files are {', '.join(map(repr, present))}")
    if any(named.values()) and not all(named.values()):
        odd = next(path.name for path, name in named.items() if name is None)
        raise DataError(f"{folder}: some file names say their split, and {odd} says none: name one file")
    kinds = sorted({kind_of(path) for path in files})
    if len(kinds) > 1:
        raise DataError(f"{folder}: expected data files of one kind, got {', '.join(kinds)}: name one file")
    return files


def _split_of(path: Path) -> str | None:
    words = re.split(r"[^a-z]+", path.name.lower())
    return next((split for split, names in _SPLITS.items() if set(names) & set(words[:-1])), None)
