"""Write files atomically and durably: after a crash a file is either complete or absent."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Fsync a file, or a folder, so that the names in it are on disk."""
    if os.name != "posix" and path.is_dir():  # a folder cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put(aside: Path, path: Path) -> None:
    """Rename `aside`, a complete file in the same folder, to `path`. Fsyncs the file before and the folder after."""
    sync(aside)
    os.replace(aside, path)
    sync(path.parent)
