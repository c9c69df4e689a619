"""Files that are there whole or not at all, whenever the machine stops."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on disk."""
    if os.name != "posix" and path.is_dir():  # there a folder cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put(aside: Path, path: Path) -> None:
    """Move a file that was written aside, in the same folder, to its place: first its bytes, then its name."""
    sync(aside)
    os.replace(aside, path)
    sync(path.parent)
