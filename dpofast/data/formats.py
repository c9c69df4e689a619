"""The formats of a preference row: which columns make up a pair or a list, and what a row that is neither raises.

    text            chosen, rejected: strings; prompt: a string, or omitted if both strings begin with it
    conversations   the same columns as lists of {"role", "content"} turns; optional: tools, chat_template_kwargs
    token ids       prompt_ids, chosen_ids, rejected_ids: lists of integers
    lists           `responses` (`responses_ids`), K >= 2 of them, in place of chosen and rejected; with ranks or scores
    with any        ref_chosen_logps, ref_rejected_logps (ref_responses_logps): the reference model's summed log-probs,
                    in nats; weight, margin, beta, label_smoothing: a number for the row; chosen_weights,
                    rejected_weights (responses_weights): a number for each token of a response; images (a list) or
                    image (one): what the prompt's image placeholders stand for

Invalid rows raise BadRow. Its reason is the same text for every row with that error, since skipped rows are counted by
reason. columns.py checks the values.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from dpofast.common.printable import printable
from dpofast.data.images.columns import ROW_IMAGES

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
PAIR_TEXT_COLUMNS, LIST_TEXT_COLUMN = ("chosen", "rejected"), "responses"
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
_EXPECTED = (
    "expected chosen and rejected (prompt is optional), or prompt_ids, chosen_ids and rejected_ids, or a list: "
    "responses (or prompt_ids and responses_ids) with ranks or scores"
)
# Columns of one kind of row that would be passed by in silence in the other.
PAIR_ONLY_COLUMNS, LIST_ONLY_COLUMNS = (*REF_COLUMNS, *WEIGHT_COLUMNS), (LIST_REF_COLUMN, LIST_WEIGHT_COLUMN)


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
    """Return those of `columns` that make up a pair or a list. If both token ids and text are present, ids are used.

    Raises:
        BadRow: a required column is missing, the columns are those of a pair and of a list, or there are videos,
            unpaired preferences, or two columns of images.
    """
    check_once(columns)
    found = set(columns)
    for column in ("video", "videos"):
        if column in found:
            raise BadRow("videos are not supported", f"remove column '{column}', or take frames of it as images")
    images = image_column(found)
    responses = {*ID_COLUMNS, *PAIR_TEXT_COLUMNS, LIST_TEXT_COLUMN, LIST_ID_COLUMNS[1]}
    unpaired = sorted(found & {"completion", "label"})
    if unpaired and not found & responses:
        raise BadRow(
            "unpaired preferences (KTO) are not supported",
            f"column '{unpaired[0]}' belongs to single completions with a label: pair a good and a bad completion of "
            "each prompt as chosen and rejected",
        )
    is_list = _is_list(found)
    if found & responses:
        _check_kind(found, is_list)
    needed: tuple[str, ...]
    if is_list:
        needed, is_ids = _list_columns(found)
    else:
        is_ids = found.issuperset(ID_COLUMNS) or bool(found & {*ID_COLUMNS} and not found & {*PAIR_TEXT_COLUMNS})
        needed = (*(ID_COLUMNS if is_ids else PAIR_TEXT_COLUMNS), *(REF_COLUMNS if found & {*REF_COLUMNS} else ()))
        needed += tuple(column for column in WEIGHT_COLUMNS if column in found)
    needed += tuple(column for column in ROW_COLUMNS if column in found)
    names = CONTEXT_COLUMNS if "prompt" in found else context_columns()
    context = [name for name in sorted(found) if name.lower() in names]
    optional = () if is_ids else ("prompt", *TEMPLATE_COLUMNS, *context)
    optional += () if images is None else (images,)
    for column in needed:
        if column not in found:
            raise BadRow(f"column '{column}' is missing", f"{_EXPECTED}; found {', '.join(sorted(found)) or 'none'}")
    return tuple(column for column in (*needed, *optional) if column in found)


def image_column(columns: Collection[str]) -> str | None:
    """Return the column that holds the images, None where there is none. Raises BadRow where there are two."""
    found = [column for column in ROW_IMAGES if column in columns]
    if len(found) > 1:
        raise BadRow("both 'images' and 'image' are there", "only one can hold a row's images: remove the other")
    return found[0] if found else None


def holds_list(columns: Collection[str]) -> bool:
    """Whether columns that used_columns returned are those of a list."""
    return LIST_TEXT_COLUMN in columns or LIST_ID_COLUMNS[1] in columns


def _is_list(found: set[str]) -> bool:
    """Whether columns are those of a list, and not of a pair. Raises BadRow where they are those of both."""
    responses = sorted(found & {LIST_TEXT_COLUMN, LIST_ID_COLUMNS[1]})
    pair = next((names for names in (PAIR_TEXT_COLUMNS, ID_COLUMNS[1:]) if found.issuperset(names)), None)
    is_ranked = bool(found & {RANK_COLUMN, SCORE_COLUMN})
    if responses and is_ranked and pair:
        raise BadRow(
            "the columns are those of a pair and of a list",
            f"'{pair[0]}' and '{pair[1]}' beside '{responses[0]}' with ranks or scores: remove those that are not "
            "to be trained on",
        )
    return bool(responses) and (is_ranked or not found & {*PAIR_TEXT_COLUMNS, *ID_COLUMNS[1:]})


def _check_kind(found: set[str], is_list: bool) -> None:
    """Raise BadRow for a column of the other kind of row, which would be passed by in silence."""
    others, own = PAIR_ONLY_COLUMNS, LIST_ONLY_COLUMNS
    for other in others if is_list else own:
        if other in found:
            kind, instead = ("pairs", ", ".join(own)) if is_list else ("lists", ", ".join(others))
            raise BadRow(f"column '{other}' belongs to {kind}", f"use {instead} here, or remove the column")


def _list_columns(found: set[str]) -> tuple[tuple[str, ...], bool]:
    """The columns of a list among those that there are, and whether it is token ids. Raises BadRow."""
    is_ids = found.issuperset(LIST_ID_COLUMNS) or LIST_TEXT_COLUMN not in found
    if not found & {RANK_COLUMN, SCORE_COLUMN}:
        raise BadRow("a list has neither ranks nor scores", f"{_EXPECTED}; found {', '.join(sorted(found))}")
    own = (RANK_COLUMN, SCORE_COLUMN, LIST_REF_COLUMN, LIST_WEIGHT_COLUMN)
    ids = LIST_ID_COLUMNS if is_ids else (LIST_TEXT_COLUMN,)
    return (*ids, *(column for column in own if column in found)), is_ids


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
    return column in (*TEMPLATE_COLUMNS, *WEIGHT_COLUMNS, LIST_WEIGHT_COLUMN, *ROW_IMAGES) or is_context(column)


def got(value: Any) -> str:
    """Return a value's type and a short form of it, for a message."""
    text = f"of {value.bit_length()} bits" if isinstance(value, int) and value.bit_length() > 400 else repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


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


def split_prompt(*whole: Any) -> tuple[Any, ...]:
    """Split two or more texts, or conversations, into their common prefix (the prompt) and the rest, by trl's rule.

    A trailing space of a text prompt is moved to the responses. If one input is a prefix of all others, its last
    character (or turn) stays in the response, so that no response is empty.

    Returns:
        The prompt, and the rest of each.
    """
    first, *others = whole
    shorter = min(map(len, whole))
    start = next((i for i in range(shorter) if any(other[i] != first[i] for other in others)), None)
    if start is None:
        start = max(shorter - 1, 0)
    # At start 0 trl tests the text's last character instead (index -1); there is no prompt to take a space from.
    elif start > 0 and first[start - 1] == " ":
        start -= 1
    return first[:start], *(each[start:] for each in whole)
