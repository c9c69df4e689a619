"""Standard output and standard error that may go away (a full disk, a closed terminal, a reader that died)."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any


class _Lasting:
    """A text stream whose write() and flush() never raise OSError: the first one is a warning, the text is lost."""

    def __init__(self, stream: Any, name: str) -> None:
        self._stream, self._name, self._lost = stream, name, False

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._say(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._say(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _say(self, error: OSError) -> None:
        if not self._lost:
            self._lost = True
            text = f"{self._name} cannot be written to ({error.strerror or error}): what is printed is lost"
            warnings.warn(text, stacklevel=3)


@contextlib.contextmanager
def lasting_output(*, stdout: bool = True) -> Iterator[None]:
    """Inside, printing never ends a run: what standard output or standard error does not take is left out.

    Args:
        stdout: False leaves standard output as it is, for a command whose result it is.
    """
    former = sys.stdout, sys.stderr
    if stdout:
        sys.stdout = _lasting(sys.stdout, "standard output")
    sys.stderr = _lasting(sys.stderr, "standard error")
    try:
        yield
    finally:
        sys.stdout, sys.stderr = former


def _lasting(stream: Any, name: str) -> Any:
    return stream if stream is None or isinstance(stream, _Lasting) else _Lasting(stream, name)


def open_standard_streams() -> None:
    """Open /dev/null where a standard stream was closed: the next file would get its number, and what is printed."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def flush_or_give_up(stream: Any) -> OSError | None:
    """Flush a standard stream; where that fails turn it to /dev/null, since Python flushes it again when it exits.

    Returns:
        The error, or None.
    """
    try:
        stream.flush()
    except OSError as error:
        with contextlib.suppress(OSError):  # no file of the system
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None


def mark_as_told(error: BaseException) -> BaseException:
    """Mark an error that came from another process, which tells the user."""
    error.told = True  # type: ignore[attr-defined]
    return error


def is_told(error: BaseException) -> bool:
    """Whether another process tells the user of an error."""
    return getattr(error, "told", False)
