"""read_rows: the rows of a JSON lines file, a JSON array or a CSV file, one by one, each a mapping or a BadRow.

Errors name the line. Turns, tools and template variables are returned as they are in the file: readers that infer one
type for a column give every turn the keys of all turns.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from dpofast.data import formats
from dpofast.data.files import check_regular, kind_of, open_source
from dpofast.data.formats import BadRow, DataError
from dpofast.data.images.columns import IMAGES, ROW_IMAGES

Row = dict[str, Any]

_ARRAY = "expected one object a line, got an array; `jq -c '.[]' file.json > file.jsonl` writes its elements so"
_HALF_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SPACE = re.compile(r"\s*")
# A file without line ends, or a small gzip of one, would otherwise be read into memory without a bound.
_LONGEST_LINE, _LONGEST_ARRAY = 1 << 28, 1 << 32


def unit_of(path: Path) -> str:
    """Return how read_rows numbers a file's rows: "line" from 1, or "row" from 0 (a JSON array)."""
    return "row" if _is_array(path) else "line"


def read_rows(path: Path) -> Iterator[tuple[int, Row | BadRow]]:
    """Yield the number of each row and its mapping, or the BadRow that says why there is none.

    Raises:
        DataError: the file cannot be read, or an array breaks off.
    """
    check_regular(path)
    try:
        if kind_of(path) in (".csv", ".tsv"):
            yield from _csv_rows(path)
        elif _is_array(path):
            yield from _array_rows(path)
        else:
            for number, line in _lines(path):
                try:
                    yield number, _parse_line(line)
                except BadRow as problem:
                    yield number, problem
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of every line that is not blank, without a byte order mark."""
    with open_source(path) as file:
        number = 0
        while line := file.readline(_LONGEST_LINE):
            number += 1
            if len(line) == _LONGEST_LINE:
                raise DataError(f"{path}, {formats.place('line', number)}: longer than {_LONGEST_LINE >> 20} MiB")
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield number, line


def _is_array(path: Path) -> bool:
    """Whether a JSON file is one array of objects; a first line that is a whole array of its own is not."""
    if kind_of(path) not in (".json", ".jsonl"):
        return False
    try:
        with open_source(path) as file:
            start = file.read(1 << 16).removeprefix(codecs.BOM_UTF8).lstrip()
    except (OSError, EOFError, zlib.error):
        return False  # said by whoever reads it
    return re.match(rb"\[\s*\{", start) is not None


def _parse_line(line: bytes) -> Row:
    try:
        text = line.decode("utf-8").rstrip()
    except UnicodeDecodeError as error:
        raise BadRow("not UTF-8", f"byte {error.start + 1} of the line is 0x{line[error.start]:02x}") from None
    try:
        row = formats.parse_json(text)
    except json.JSONDecodeError as error:
        if text.startswith("["):
            raise BadRow("not a JSON object", _ARRAY) from None
        is_cut = error.pos >= len(text) or error.msg.startswith("Unterminated string")
        detail = "the line ends before its object does" if is_cut else f"{error.msg} at character {error.pos + 1}"
        raise BadRow("not valid JSON", detail) from None
    # A number of thousands of digits or beyond float64, a name that stands twice; brackets nested too deep.
    except (ValueError, RecursionError) as error:
        raise BadRow("not valid JSON", str(error)) from None
    if isinstance(row, list):
        raise BadRow("not a JSON object", _ARRAY)
    return _checked(row, text)


def _checked(row: Any, text: str) -> Row:
    if not isinstance(row, dict):
        raise BadRow("not a JSON object", f"expected one object a line, got {type(row).__name__}")
    if _HALF_SURROGATE.search(text):
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadRow("half of a surrogate pair", "\\ud800 to \\udfff alone is no character") from None
    return row


def _array_rows(path: Path) -> Iterator[tuple[int, Row | BadRow]]:
    """The elements of an array, whose text is held in memory while they are read."""
    with open_source(path) as file:
        content = file.read(_LONGEST_ARRAY)
    if len(content) == _LONGEST_ARRAY:
        raise DataError(f"{path}: an array of more than {_LONGEST_ARRAY >> 30} GiB: write one object a line (.jsonl)")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: byte {error.start + 1} is 0x{content[error.start]:02x}") from None
    del content
    decoder = json.JSONDecoder()
    number, position = 0, _after_space(text, 0) + 1
    while not text.startswith("]", start := _after_space(text, position)):
        try:
            _, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, {formats.place('row', number)}: not valid JSON: {error}") from None
        try:
            yield number, _parse_element(text[start:end])
        except BadRow as problem:
            yield number, problem
        number += 1
        position = _after_space(text, end)
        if text.startswith(",", position):
            position += 1
        elif not text.startswith("]", position):
            raise DataError(f"{path}, {formats.place('row', number)}: not valid JSON: the array ends before its ]")
    if text[start + 1 :].strip():
        raise DataError(f"{path}: not valid JSON: text follows the array's ]")


def _parse_element(text: str) -> Row:
    try:
        return _checked(formats.parse_json(text), text)
    except (ValueError, RecursionError) as error:
        raise BadRow("not valid JSON", str(error)) from None


def _after_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _csv_rows(path: Path) -> Iterator[tuple[int, Row | BadRow]]:
    """Rows of a file with a header. Numbers and lists (turns, tools, token ids) are written as JSON in their fields."""
    csv.field_size_limit(_LONGEST_LINE)
    delimiter = "\t" if kind_of(path) == ".tsv" else ","
    with open_source(path) as file:
        rows = csv.reader(_decoded(file), delimiter=delimiter, strict=True)
        try:
            header = next(rows, None)
            if header is None:
                return
            if not all(map(_is_utf8, header)):
                raise DataError(f"{path}: its header is not UTF-8: save the file as UTF-8 (UTF-16 is not read)")
            try:
                formats.check_once(header)
            except BadRow as problem:
                raise DataError(f"{path}: {problem}") from None
            spelled = _spelled_columns(header)
            number = rows.line_num + 1  # of a row's first line
            for fields in rows:
                if fields:
                    try:
                        yield number, _csv_row(header, fields, spelled)
                    except BadRow as problem:
                        yield number, problem
                number = rows.line_num + 1
        except csv.Error as error:
            raise DataError(f"{path}, {formats.place('line', rows.line_num)}: not valid CSV: {error}") from None


def _decoded(file: IO[bytes]) -> Iterator[str]:
    return iter(io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=""))


def _spelled_columns(header: list[str]) -> frozenset[str]:
    """The columns that are used and hold numbers or lists, which are written as JSON."""
    spelled = {*formats.ID_COLUMNS, *formats.REF_COLUMNS, *formats.TEMPLATE_COLUMNS, IMAGES}
    try:
        used = formats.used_columns(header)
    except BadRow:  # said of the rows
        return frozenset(spelled)
    numbers = {*formats.ROW_COLUMNS, *formats.WEIGHT_COLUMNS}
    if formats.holds_list(used):
        numbers |= {formats.RANK_COLUMN, formats.SCORE_COLUMN, *formats.LIST_ONLY_COLUMNS}
        numbers |= {formats.LIST_TEXT_COLUMN, formats.LIST_ID_COLUMNS[1]}
    return frozenset(spelled | (numbers & {*used}))


def _csv_row(header: list[str], fields: list[str], spelled: frozenset[str]) -> Row:
    if len(fields) != len(header):
        raise BadRow("another number of fields than the header", f"expected {len(header)}, got {len(fields)}")
    row: Row = dict(zip(header, fields, strict=True))
    for name, text in row.items():
        if not _is_utf8(text):
            raise BadRow("not UTF-8", f"column '{name}'")
        if not text and name in (*spelled, *ROW_IMAGES) and name not in formats.ID_COLUMNS:
            row[name] = None
        elif name in spelled or _is_json_turns(text):
            try:
                row[name] = formats.parse_json(text)
            except (ValueError, RecursionError) as error:
                if name not in formats.ROW_COLUMNS:  # of these the text says what they are taken for
                    raise BadRow(f"column '{name}' is not valid JSON", str(error)) from None
    return row


def _is_utf8(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _is_json_turns(text: str) -> bool:
    return re.match(r'\s*\[\s*\{\s*"', text) is not None and '"role"' in text
