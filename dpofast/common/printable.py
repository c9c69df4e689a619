"""printable: text from files and names, as it can be shown on a terminal."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator

# Python counts these as space. A terminal does not: they move its cursor, or break a line where no one sees it.
_NO_SPACE = frozenset("\r\v\f\x1c\x1d\x1e\x1f\x85\u2028\u2029")
# What transformers prints bold or in colours, also where nobody could see it.
_STYLE = re.compile("\x1b\\[[0-9;]*m")


def printable(text: str) -> str:
    """Escape what steers a terminal or hides text: control characters, direction marks, surrogates.

    Spaces, tabs and line breaks stay. ESC becomes the four characters backslash, x, 1, b. Applied twice it is the same.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or _is_space(char) else ascii(char)[1:-1] for char in text)


def _is_space(char: str) -> bool:
    return char.isspace() and char not in _NO_SPACE


class _PrintableRecord(logging.LogRecord):
    def getMessage(self) -> str:
        return printable(_STYLE.sub("", super().getMessage()))


@contextlib.contextmanager
def printable_messages() -> Iterator[None]:
    """Inside, Python's warnings and all log records, those of libraries too, are printed escaped."""
    formatted, record = warnings.formatwarning, logging.getLogRecordFactory()
    warnings.formatwarning = lambda *args, **options: printable(formatted(*args, **options))
    logging.setLogRecordFactory(_PrintableRecord)
    try:
        yield
    finally:
        warnings.formatwarning = formatted
        logging.setLogRecordFactory(record)
