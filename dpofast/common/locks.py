"""WriteLock: what one process writes, no other one writes at the same time. A dead process holds no lock (flock)."""

from __future__ import annotations

import contextlib
import os
import socket
import warnings
import weakref
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None  # type: ignore[assignment]

_LONGEST_HOLDER = 300  # bytes


class WriteLock:
    """Context manager that holds a lock on something that is written; reentrant within its process.

    Args:
        target: what is written, a file or a folder: the name in messages.
        path: the lock's own file, in a folder that exists when the lock is taken. It is removed afterwards; the one
            that a killed process leaves behind is no lock any more.
    """

    def __init__(self, target: Path, path: Path) -> None:
        """Lock nothing yet."""
        self.target, self.path = target, path
        self._descriptor: int | None = None
        self._depth = 0

    def __enter__(self) -> WriteLock:
        """Take the lock, without waiting for it.

        Raises:
            ValueError: another process holds it.
            OSError: its file cannot be written.
        """
        if self._depth == 0 and fcntl is not None:
            self._descriptor = self._locked()
            _held.add(self)
        self._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock."""
        self._depth -= 1
        if self._depth == 0 and self._descriptor is not None:
            with contextlib.suppress(OSError):  # its folder is gone
                self.path.unlink()  # while it is held, so that nobody else's is removed
            self.drop()

    def drop(self) -> None:
        """Close the file, which releases the lock unless another process has inherited it."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _locked(self) -> int | None:
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(descriptor, _LONGEST_HOLDER, 0).decode(errors="replace") or "another process"
                os.close(descriptor)
                raise ValueError(
                    f"{self.target}: {holder} is writing to it: wait until it has ended, or name another"
                ) from None
            except OSError as error:  # a file system without locks
                os.close(descriptor)
                warnings.warn(
                    f"{self.target}: cannot be locked ({error.strerror}): start no second run that writes to it",
                    stacklevel=3,
                )
                return None
            if self._is_current(descriptor):
                break
            os.close(descriptor)  # its holder removed the file in between
        with contextlib.suppress(OSError):  # on a full disk it is a lock without a name
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        return descriptor

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False


_held: weakref.WeakSet[WriteLock] = weakref.WeakSet()


def _drop_in_child() -> None:
    """A forked child (a data-loading worker) would hold the lock longer than the run that took it."""
    for lock in list(_held):
        lock.drop()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_in_child)
