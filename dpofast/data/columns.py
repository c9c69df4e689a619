"""Check the value in each column of a preference row: type, shape, range, and that numbers are finite float32."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from dpofast.data import formats
from dpofast.data.formats import (
    ID_COLUMNS,
    LIST_ID_COLUMNS,
    LIST_REF_COLUMN,
    LIST_TEXT_COLUMN,
    LIST_WEIGHT_COLUMN,
    PAIR_TEXT_COLUMNS,
    RANK_COLUMN,
    REF_COLUMNS,
    ROW_COLUMNS,
    SCORE_COLUMN,
    TEMPLATE_COLUMNS,
    WEIGHT_COLUMNS,
    BadRow,
    got,
)
from dpofast.data.images.columns import ROW_IMAGES
from dpofast.data.images.decode import source_of
from dpofast.data.images.stored import images_of

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_ROUNDING = 1e-3  # of a sum of log-probs that are all nearly 0, nats
_INT32_MAX = int(np.iinfo(np.int32).max)
_TINY = float(np.finfo(np.float32).smallest_subnormal)
_LAST_BELOW_1 = float(np.nextafter(np.float32(1), np.float32(0)))


class RowNumber(NamedTuple):
    """What a number of the row is: its least and largest value as float32, how a message says them, what it does."""

    least: float
    most: float
    range: str
    words: str


ROW_NUMBERS = {
    "weight": RowNumber(0.0, _FLOAT32_MAX, "of 0 or more", "the factor of the row's loss"),
    "margin": RowNumber(-_FLOAT32_MAX, _FLOAT32_MAX, "", "the offset in nats that is subtracted from the row's margin"),
    "beta": RowNumber(_TINY, _FLOAT32_MAX, "above 0", "the row's beta, in place of the option"),
    "label_smoothing": RowNumber(0.0, _LAST_BELOW_1, "in [0, 1)", "the row's label_smoothing, in place of the option"),
}


def row_kinds(row: Mapping[str, Any], columns: Collection[str]) -> dict[str, str]:
    """Return the kind of value in each of the row's columns.

    "text", "messages", "ids", "number", "numbers", "json", "images" or "image"; of lists "texts", "conversations",
    "lists of ids" or "lists of numbers".

    Raises:
        BadRow: a value is missing or of the wrong type, or text and conversations are mixed.
    """
    kinds = {}
    for column in columns:
        if row.get(column) is not None:
            kinds[column] = _kind(column, row[column])
        elif not formats.is_optional(column):
            meaning = f"; {_meant(column)}" if column in ROW_COLUMNS else ""
            raise BadRow(f"column '{column}' is missing", f"the row lacks it, or holds null{meaning}")
    # A text prompt next to conversations is valid: some datasets repeat the first turn there.
    responses = {_OF_ONE.get(kinds[c], kinds[c]) for c in (*PAIR_TEXT_COLUMNS, LIST_TEXT_COLUMN) if c in kinds}
    if len(responses) > 1 or (kinds.get("prompt") == "messages" and responses != {"messages"}):
        raise BadRow("text and conversations are mixed", ", ".join(f"{k} holds {v}" for k, v in kinds.items()))
    return kinds


def _check_images(column: str, value: Any) -> None:
    """Raise BadRow for what is no image by its type. None is opened."""
    images = images_of(value)
    for image in images:
        source_of(image)
    if column == "image" and len(images) > 1:
        raise BadRow("column 'image' holds several images", f"got {len(images)}: it is for one, name it 'images'")


_OF_ONE = {"texts": "text", "conversations": "messages"}


def _kind(column: str, value: Any) -> str:
    if formats.is_context(column):
        return "json"
    if column in ROW_IMAGES:
        _check_images(column, value)
        return column
    if column in (*ID_COLUMNS, LIST_ID_COLUMNS[1]):
        each = _each(column, value) if column == LIST_ID_COLUMNS[1] else [value]
        for ids in each:
            token_ids(column, ids)
        return "ids" if column in ID_COLUMNS else "lists of ids"
    if column in REF_COLUMNS:
        _check_reference(column, value)
        return "number"
    if column in ROW_COLUMNS:
        _check_row_number(column, value)
        return "number"
    if column in (RANK_COLUMN, SCORE_COLUMN, LIST_REF_COLUMN):
        for number in _each(column, value):
            _check_finite(column, number)
            if column == LIST_REF_COLUMN:
                _check_reference(column, number)
        return "numbers"
    if column in WEIGHT_COLUMNS:
        token_weights(column, value)
        return "numbers"
    if column == LIST_WEIGHT_COLUMN:
        for weights in _each(column, value):
            if weights is not None:
                token_weights(column, weights)
        return "lists of numbers"
    if column in TEMPLATE_COLUMNS:
        template_value(column, value)
        return "json"
    if column == LIST_TEXT_COLUMN:
        kinds = {_kind_of_text(column, each) for each in _each(column, value)}
        if len(kinds) > 1:
            raise BadRow("text and conversations are mixed", f"column '{column}' holds both")
        return "conversations" if kinds == {"messages"} else "texts"
    return _kind_of_text(column, value)


def _kind_of_text(column: str, value: Any) -> str:
    if isinstance(value, str):
        if _spells_turns(value):
            raise BadRow(
                f"column '{column}' is text that spells a conversation",
                f"expected the list of turns itself, got {got(value)}; parse it with json.loads (or ast.literal_eval)",
            )
        return "text"
    if isinstance(value, list) and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value):
        return "messages"
    is_list = column == LIST_TEXT_COLUMN
    from_and_value = isinstance(value, list) and any(isinstance(m, dict) and {"from", "value"} <= {*m} for m in value)
    rename = "; rename the keys: from to role, value to content" if from_and_value else ""
    problem = "not a list of texts or conversations" if is_list else "neither text nor a conversation"
    raise BadRow(
        f"column '{column}' is {problem}",
        f"expected {'for each response ' if is_list else ''}a string or a list of "
        f'{{"role": ..., "content": ...}} objects, got {got(value)}{rename}',
    )


def _spells_turns(text: str) -> bool:
    """Whether a text is the JSON, or Python's repr, of a list of turns."""
    start = text[:200].lstrip()
    return start.startswith("[") and start[1:].lstrip().startswith("{") and ('"role"' in text or "'role'" in text)


def _each(column: str, value: Any) -> list[Any]:
    """A list with one value for each response. Raises BadRow for anything else."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list):
        raise BadRow(f"column '{column}' is not a list", f"expected a value for each response, got {got(value)}")
    return value


# ---- numbers --------------------------------------------------------------------------------------------------------


def _check_finite(column: str, value: Any, meaning: str = "") -> None:
    """Raise BadRow unless a value is a number, and a finite float32."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise BadRow(f"column '{column}' is not a number", f"got {got(value)}{meaning}")
    if not abs(value) <= _FLOAT32_MAX:
        raise BadRow(f"column '{column}' is not finite", f"expected a float32, got {got(value)}{meaning}")


def _check_reference(column: str, value: Any) -> None:
    _check_finite(column, value)
    if value > _ROUNDING:
        raise BadRow(
            f"column '{column}' is above 0",
            f"expected a log-prob summed over the response, which is 0 or less, got {got(value)}: a loss (its "
            "negative) or a probability is something else",
        )


def _check_row_number(column: str, value: Any) -> None:
    meaning = ROW_NUMBERS[column]
    _check_finite(column, value, f"; {_meant(column)}")
    if not meaning.least <= float(np.float32(value)) <= meaning.most:
        raise BadRow(
            f"column '{column}' is out of range", f"expected a number {meaning.range}, got {value!r}; {_meant(column)}"
        )


def _meant(column: str) -> str:
    return f"it is {ROW_NUMBERS[column].words}: rename the column if it means something else"


def token_weights(column: str, value: Any) -> list[float]:
    """Return the weights of a response's tokens, booleans as 0 and 1.

    Raises:
        BadRow: unless they are a list of booleans or of finite numbers of 0 or more, and one is above 0.
    """
    try:
        array = np.asarray(value)
    except ValueError:  # a ragged list
        array = np.empty(0, dtype=object)
    if array.ndim != 1 or (array.dtype.kind not in "biuf" and value != []):
        raise BadRow(f"column '{column}' is not a list of numbers", f"expected one for each token, got {got(value)}")
    weights = array.astype(np.float64).tolist()
    if not weights:
        raise BadRow(f"column '{column}' holds no weight", "expected one for each token, got []; null trains them all")
    wrong = next((weight for weight in weights if not 0 <= weight <= _FLOAT32_MAX), None)
    if wrong is not None:
        raise BadRow(f"column '{column}' holds a weight out of range", f"expected finite numbers >= 0, got {wrong!r}")
    if not any(np.float32(weight) > 0 for weight in weights):
        raise BadRow(
            f"column '{column}' gives every token weight 0", "at least one token must count: use null to train them all"
        )
    return weights


# ---- token ids and what the template reads --------------------------------------------------------------------------


def token_ids(column: str, value: Any) -> list[int]:
    """Return token ids as a list. Raises BadRow unless they are integers in [0, 2**31)."""
    try:
        array = np.asarray(value)
    except ValueError:  # a ragged list
        array = np.empty(0, dtype=object)
    # numpy would convert a boolean among integers to 0 or 1.
    mixed = isinstance(value, list) and bool in set(map(type, value))
    if mixed or array.ndim != 1 or (array.dtype.kind not in "iu" and value != []):
        raise BadRow(f"column '{column}' is not a list of token ids", f"expected integers, got {got(value)}")
    if array.size and not 0 <= array.min() <= array.max() <= _INT32_MAX:
        raise BadRow(f"column '{column}' holds a token id outside [0, 2**31)", f"from {array.min()} to {array.max()}")
    return array.tolist()


def template_value(column: str, value: Any) -> Any:
    """Return tools as a list (parsed if given as JSON text), or chat_template_kwargs as a dict. Raises BadRow."""
    if column == "tools" and isinstance(value, str):
        try:
            value = formats.parse_json(value)
        except (ValueError, RecursionError) as error:
            raise BadRow("column 'tools' is not valid JSON", str(error)) from None
    expected = list if column == "tools" else dict
    if value is not None and not isinstance(value, expected):
        raise BadRow(f"column '{column}' is not a {expected.__name__}", f"got {got(value)}")
    return value
