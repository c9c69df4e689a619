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
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from dpofast.common.printable import printable

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
REF_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
# Of a token-level dataset of lists: responses best first, dense ranks from 0, their places in the row of the source.
LIST_ID_COLUMNS = ("prompt_ids", "responses_ids")
RANK_COLUMN, SCORE_COLUMN, ORDER_COLUMN = "ranks", "scores", "order"
LIST_REF_COLUMN = "ref_responses_logps"
# A number for every pair or list.
ROW_COLUMNS = ("weight", "margin", "beta", "label_smoothing")
# A number for every token of a response.
WEIGHT_COLUMNS, LIST_WEIGHT_COLUMN = ("chosen_weights", "rejected_weights"), "responses_weights"
# Only these may be null in a row although the dataset has the column.
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
# What other formats call the prompt or a part of it. Their text must be in the prompt: no other place is read.
CONTEXT_COLUMNS = frozenset(
    (
        "system",
        "system_prompt",
        "question",
        "query",
        "instruction",
        "instructions",
        "input",
        "user_prompt",
        "user_input",
    )
    + ("history", "context_messages", "problem")
)
# Columns that hold the whole conversation where there is a prompt, and the prompt where there is none.
_OTHER_PROMPTS = frozenset(("messages", "conversation", "conversations", "user", "human"))
MOST_NESTED = 64  # levels of a JSON value: deeper ones exhaust the stacks of the parsers that read them later

_ROLES = ("system", "user", "assistant", "human", "gpt", "tool")
_EXPECTED = "expected chosen and rejected (prompt is optional), or prompt_ids, chosen_ids and rejected_ids"
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_ROUNDING = 1e-3  # of a sum of log-probs that are all nearly 0, nats
_INT32_MAX = int(np.iinfo(np.int32).max)


class DataError(ValueError):
    """Data that cannot be used. The message names the file, the row if there is one, and the reason."""

    def __init__(self, message: str) -> None:
        """Store the message, with control characters of the data escaped."""
        super().__init__(printable(message))


class BadRow(Exception):
    """A row that cannot be used; a `fatal` error concerns more than this row and is never skipped."""

    def __init__(self, reason: str, detail: str = "", *, fatal: bool = False) -> None:
        """Store the reason, equal for all rows with this error; `detail` of this row goes into the message only."""
        super().__init__(printable(f"{reason}: {detail}" if detail else reason))
        self.reason = printable(reason)
        self.fatal = fatal


def excerpt(text: str, start: int = 0, length: int = 120) -> str:
    """Return a quoted piece of a text on one line, `length` characters from `start` on, with ... where it was cut."""
    piece = text[start : start + length]
    return f"{'...' * (start > 0)}{piece!r}{'...' * (start + length < len(text))}"


def place(unit: str, number: int) -> str:
    """Name a row in a message; `unit` is "line" (numbered from 1) or "row" (from 0)."""
    return f"line {number}" if unit == "line" else f"row {number} (counted from 0)"


def used_columns(columns: Collection[str]) -> tuple[str, ...]:
    """Return those of `columns` that make up a pair. If both token ids and text are present, the ids are used.

    Raises:
        BadRow: a required column is missing, or there are images or unpaired preferences.
    """
    check_once(columns)
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
    names = CONTEXT_COLUMNS if "prompt" in found else context_columns()
    context = [name for name in sorted(found) if name.lower() in names]
    optional = () if is_ids else ("prompt", *TEMPLATE_COLUMNS, *context)
    if found & {*REF_COLUMNS}:
        needed += REF_COLUMNS
    for column in needed:
        if column not in found:
            raise BadRow(f"column '{column}' is missing", f"{_EXPECTED}; found {', '.join(sorted(found)) or 'none'}")
    return tuple(column for column in (*needed, *optional) if column in found)


def check_once(columns: Collection[str]) -> None:
    """Raise BadRow where two columns have one name."""
    names = list(columns)
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise BadRow(f"column '{double}' stands there twice", "only one can hold: rename or remove the other")


def is_context(column: str) -> bool:
    """Whether a column's name says that it holds the prompt, or a part of it that has no place beside `prompt`."""
    return column.lower() in context_columns()


def context_columns() -> frozenset[str]:
    """Return every name for which is_context holds, in lower case."""
    return CONTEXT_COLUMNS | _OTHER_PROMPTS


def is_optional(column: str) -> bool:
    """Whether a row may hold null in a column that the dataset has."""
    return column in TEMPLATE_COLUMNS or is_context(column)


def row_kinds(row: Mapping[str, Any], columns: Collection[str]) -> dict[str, str]:
    """Return the kind of value in each of the row's columns: "text", "messages", "ids", "number" or "json".

    Raises:
        BadRow: a value is missing or of the wrong type, or text and conversations are mixed.
    """
    kinds = {}
    for column in columns:
        if row.get(column) is not None:
            kinds[column] = _kind(column, row[column])
        elif not is_optional(column):
            raise BadRow(f"column '{column}' is missing", "the row lacks it, or holds null")
    # A text prompt next to conversations is valid: some datasets repeat the first turn there.
    responses = {kinds.get("chosen"), kinds.get("rejected")}
    if len(responses) > 1 or (kinds.get("prompt") == "messages" and responses != {"messages"}):
        raise BadRow("text and conversations are mixed", ", ".join(f"{k} holds {v}" for k, v in kinds.items()))
    return kinds


def _kind(column: str, value: Any) -> str:
    if is_context(column):
        return "json"
    if column in ID_COLUMNS:
        token_ids(column, value)
        return "ids"
    if column in REF_COLUMNS:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise BadRow(f"column '{column}' is not a number", f"got {_got(value)}")
        if not abs(value) <= _FLOAT32_MAX:
            raise BadRow(f"column '{column}' is not finite", f"expected a float32, got {_got(value)}")
        if value > _ROUNDING:
            raise BadRow(
                f"column '{column}' is above 0",
                f"expected a log-prob summed over the response, which is 0 or less, got {_got(value)}: a loss (its "
                "negative) or a probability is something else",
            )
        return "number"
    if column in TEMPLATE_COLUMNS:
        template_value(column, value)
        return "json"
    if isinstance(value, str):
        if _spells_turns(value):
            raise BadRow(
                f"column '{column}' is text that spells a conversation",
                f"expected the list of turns itself, got {_got(value)}; parse it with json.loads (or ast.literal_eval)",
            )
        return "text"
    if isinstance(value, list) and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value):
        return "messages"
    raise BadRow(
        f"column '{column}' is neither text nor a conversation",
        f'expected a string or a list of {{"role": ..., "content": ...}} objects, got {_got(value)}',
    )


def _spells_turns(text: str) -> bool:
    """Whether a text is the JSON, or Python's repr, of a list of turns."""
    start = text[:200].lstrip()
    return start.startswith("[") and start[1:].lstrip().startswith("{") and ('"role"' in text or "'role'" in text)


def _got(value: Any) -> str:
    text = f"of {value.bit_length()} bits" if isinstance(value, int) and value.bit_length() > 400 else repr(value)
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
            value = parse_json(value)
        except (ValueError, RecursionError) as error:
            raise BadRow("column 'tools' is not valid JSON", str(error)) from None
    expected = list if column == "tools" else dict
    if value is not None and not isinstance(value, expected):
        raise BadRow(f"column '{column}' is not a {expected.__name__}", f"got {_got(value)}")
    return value


def parse_json(text: str) -> Any:
    """Parse JSON text as json.loads does, but refuse what would be read as something else than it says.

    Raises:
        ValueError: not JSON, a name that stands twice in an object, or a number beyond float64.
        RecursionError: brackets nested deeper than MOST_NESTED.
    """
    value = json.loads(text, object_pairs_hook=_object, parse_float=finite)
    if text.count("[") + text.count("{") > MOST_NESTED and _is_deep(value):
        raise RecursionError(f"nested deeper than {MOST_NESTED} levels (maximum recursion)")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    built = dict(pairs)
    if len(built) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{double!r} stands twice in one object, and only one can hold")
    return built


def finite(text: str) -> float:
    """Return a JSON number. Raises ValueError where float64 would make it infinite."""
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"the number {excerpt(text, 0, 30)} is beyond float64")
    return number


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MOST_NESTED + 1):
        level = [part for item in level for part in _parts(item)]
    return bool(level)


def _parts(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def strings(value: Any) -> Iterator[str]:
    """Yield every string inside a value of JSON."""
    if isinstance(value, str):
        yield value
    for part in _parts(value):
        yield from strings(part)


def without_nulls(value: Any) -> Any:
    """Return a value without the keys that hold null; a turn keeps its `content`.

    An Arrow struct has the keys of all rows, so that nulls stand where a row had no such key. A template would write
    them, or take the key for given. Nulls inside lists are values, and stay.
    """
    if isinstance(value, list):
        return [without_nulls(part) for part in value]
    if isinstance(value, dict):
        return {
            name: without_nulls(part)
            for name, part in value.items()
            if part is not None or (name == "content" and "role" in value)
        }
    return value


def check_context(column: str, value: Any, prompt: str, responses: Any) -> None:
    """Raise BadRow where a column that is named like a part of the prompt holds text that the prompt does not."""
    names = _ROLES if isinstance(value, list) else ()
    if column.lower() in _OTHER_PROMPTS:
        prompt = "\n".join([prompt, *strings(responses)])
    for text in strings(value):
        if text not in names and text.strip() and text.strip() not in prompt:
            raise BadRow(
                f"column '{column}' holds text that is not in the prompt, and would not be trained on",
                f"{excerpt(text, 0, 60)}: write it into `prompt` (a system prompt as its first turn), or remove the "
                "column",
            )


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
