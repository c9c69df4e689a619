"""Detect and validate the format of a preference row: text, conversations or token ids, as trl takes them.

    text            chosen, rejected: strings; prompt: a string, or omitted if both strings begin with it
    conversations   the same columns as lists of {"role", "content"} turns; optional: tools, chat_template_kwargs
    token ids       prompt_ids, chosen_ids, rejected_ids: lists of integers
    with any        ref_chosen_logps, ref_rejected_logps: the reference model's summed log-probs, in nats

Invalid rows raise BadRow. Its reason is the same text for every row with that error, since skipped rows are counted by
reason.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
REF_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
# Only these may be null in a row although the dataset has the column.
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")

_EXPECTED = "expected chosen and rejected (prompt is optional), or prompt_ids, chosen_ids and rejected_ids"
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_INT32_MAX = int(np.iinfo(np.int32).max)


class DataError(ValueError):
    """Data that cannot be used. The message names the file, the row if there is one, and the reason."""


class BadRow(Exception):
    """A row that cannot be used; a `fatal` error concerns more than this row and is never skipped."""

    def __init__(self, reason: str, detail: str = "", *, fatal: bool = False) -> None:
        """Store the reason, equal for all rows with this error; `detail` of this row goes into the message only."""
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.fatal = fatal


def place(unit: str, number: int) -> str:
    """Name a row in a message; `unit` is "line" (numbered from 1) or "row" (from 0)."""
    return f"line {number}" if unit == "line" else f"row {number} (counted from 0)"


def used_columns(columns: Collection[str]) -> tuple[str, ...]:
    """Return those of `columns` that make up a pair. If both token ids and text are present, the ids are used.

    Raises:
        BadRow: a required column is missing, or there are images or unpaired preferences.
    """
    found = set(columns)
    for column in ("image", "images"):
        if column in found:
            raise BadRow("images are not supported", f"remove column '{column}' to train on the text alone")
    unpaired = sorted(found & {"completion", "label"})
    if unpaired and not found & {*ID_COLUMNS, "chosen", "rejected"}:
        raise BadRow(
            "unpaired preferences (KTO) are not supported",
            f"column '{unpaired[0]}' belongs to single completions with a label: pair a good and a bad completion of "
            "each prompt as chosen and rejected",
        )
    is_ids = found.issuperset(ID_COLUMNS) or bool(found & {*ID_COLUMNS} and not found & {"chosen", "rejected"})
    needed: tuple[str, ...] = ID_COLUMNS if is_ids else ("chosen", "rejected")
    optional = () if is_ids else ("prompt", *TEMPLATE_COLUMNS)
    if found & {*REF_COLUMNS}:
        needed += REF_COLUMNS
    for column in needed:
        if column not in found:
            raise BadRow(f"column '{column}' is missing", f"{_EXPECTED}; found {', '.join(sorted(found)) or 'none'}")
    return tuple(column for column in (*needed, *optional) if column in found)


def row_kinds(row: Mapping[str, Any], columns: Collection[str]) -> dict[str, str]:
    """Return the kind of value in each of the row's columns: "text", "messages", "ids", "number" or "json".

    Raises:
        BadRow: a value is missing or of the wrong type, or text and conversations are mixed.
    """
    kinds = {}
    for column in columns:
        if row.get(column) is not None:
            kinds[column] = _kind(column, row[column])
        elif column not in TEMPLATE_COLUMNS:
            raise BadRow(f"column '{column}' is missing", "the row lacks it, or holds null")
    # A text prompt next to conversations is valid: some datasets repeat the first turn there.
    responses = {kinds.get("chosen"), kinds.get("rejected")}
    if len(responses) > 1 or (kinds.get("prompt") == "messages" and responses != {"messages"}):
        raise BadRow("text and conversations are mixed", ", ".join(f"{k} holds {v}" for k, v in kinds.items()))
    return kinds


def _kind(column: str, value: Any) -> str:
    if column in ID_COLUMNS:
        token_ids(column, value)
        return "ids"
    if column in REF_COLUMNS:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise BadRow(f"column '{column}' is not a number", f"got {_got(value)}")
        if not abs(value) <= _FLOAT32_MAX:
            raise BadRow(f"column '{column}' is not finite", f"expected a float32, got {_got(value)}")
        return "number"
    if column in TEMPLATE_COLUMNS:
        template_value(column, value)
        return "json"
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value):
        return "messages"
    raise BadRow(
        f"column '{column}' is neither text nor a conversation",
        f'expected a string or a list of {{"role": ..., "content": ...}} objects, got {_got(value)}',
    )


def _got(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def token_ids(column: str, value: Any) -> list[int]:
    """Return token ids as a list. Raises BadRow unless they are integers in [0, 2**31)."""
    try:
        array = np.asarray(value)
    except ValueError:  # a ragged list
        array = np.empty(0, dtype=object)
    # numpy would convert a boolean among integers to 0 or 1.
    mixed = isinstance(value, list) and bool in set(map(type, value))
    if mixed or array.ndim != 1 or (array.dtype.kind not in "iu" and value != []):
        raise BadRow(f"column '{column}' is not a list of token ids", f"expected integers, got {_got(value)}")
    if array.size and not 0 <= array.min() <= array.max() <= _INT32_MAX:
        raise BadRow(f"column '{column}' holds a token id outside [0, 2**31)", f"from {array.min()} to {array.max()}")
    return array.tolist()


def template_value(column: str, value: Any) -> Any:
    """Return tools as a list (parsed if given as JSON text), or chat_template_kwargs as a dict. Raises BadRow."""
    if column == "tools" and isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadRow("column 'tools' is not valid JSON", str(error)) from None
    expected = list if column == "tools" else dict
    if value is not None and not isinstance(value, expected):
        raise BadRow(f"column '{column}' is not a {expected.__name__}", f"got {_got(value)}")
    return value


def split_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Split two texts, or two conversations, into their common prefix (the prompt) and the rest, by trl's rule.

    A trailing space of a text prompt is moved to the responses. If one input is a prefix of the other, its last
    character (or turn) stays in the response, so that no response is empty.

    Returns:
        The prompt, and the rest of chosen and of rejected.
    """
    shorter = min(len(chosen), len(rejected))
    start = next((i for i in range(shorter) if chosen[i] != rejected[i]), None)
    if start is None:
        start = max(shorter - 1, 0)
    # At start 0 trl tests the text's last character instead (index -1); there is no prompt to take a space from.
    elif start > 0 and chosen[start - 1] == " ":
        start -= 1
    return chosen[:start], chosen[start:], rejected[start:]
