"""What a row of a token-level dataset holds, a pair or a list: its responses, their weights, its reference."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dpofast.data.formats import (
    ID_COLUMNS,
    LIST_ID_COLUMNS,
    LIST_REF_COLUMN,
    LIST_WEIGHT_COLUMN,
    RANK_COLUMN,
    REF_COLUMNS,
    ROW_COLUMNS,
    SCORE_COLUMN,
    WEIGHT_COLUMNS,
)

PROMPT, RESPONSES = LIST_ID_COLUMNS
# Every column that decides what a loss is, but for reference log-probs: what must be equal in a resumed run.
DECIDING_COLUMNS = (
    *ID_COLUMNS,
    *(RESPONSES, RANK_COLUMN, SCORE_COLUMN),
    *ROW_COLUMNS,
    *(*WEIGHT_COLUMNS, LIST_WEIGHT_COLUMN),
)


def has_lists(columns: Collection[str] | None) -> bool:
    """Whether rows with these columns are lists of responses, and not pairs."""
    return RESPONSES in (columns or ())


def reference_columns(columns: Collection[str] | None) -> tuple[str, ...]:
    """The names under which reference log-probs stand beside these columns: two for pairs, one for lists."""
    return (LIST_REF_COLUMN,) if has_lists(columns) else REF_COLUMNS


def has_reference(columns: Collection[str] | None) -> bool:
    """Whether rows with these columns bring reference log-probs."""
    return set(reference_columns(columns)) <= set(columns or ())


def token_columns(columns: Collection[str]) -> tuple[str, ...]:
    """Of these columns, those that hold the token ids of a row: prompt, then responses."""
    return LIST_ID_COLUMNS if has_lists(columns) else ID_COLUMNS


def weight_columns(columns: Collection[str]) -> tuple[str, ...]:
    """Of these columns, those that weight tokens: one for each response column, or none."""
    names = (LIST_WEIGHT_COLUMN,) if has_lists(columns) else WEIGHT_COLUMNS
    return names if set(names) <= set(columns) else ()


def responses_of(row: Mapping[str, Any]) -> list[Any]:
    """The token ids of a row's responses: of a list best first, of a pair chosen and rejected."""
    return list(row[RESPONSES]) if has_lists(row) else [row[name] for name in ID_COLUMNS[1:]]


def with_best_and_worst(row: dict[str, Any]) -> dict[str, Any]:
    """A row with chosen_ids and rejected_ids: of a list its first (best) and last (worst) response, not copied."""
    if not has_lists(row):
        return row
    responses = row[RESPONSES]
    return row | dict(zip(ID_COLUMNS[1:], (responses[0], responses[-1]), strict=True))


def best_weight(row: Mapping[str, Any]) -> float:
    """What the tokens of a row's chosen, or best, response count together: their number, or the sum of weights."""
    weights = row.get(WEIGHT_COLUMNS[0])
    if has_lists(row):
        of_all = row.get(LIST_WEIGHT_COLUMN)
        weights = None if of_all is None else of_all[0]
    return len(responses_of(row)[0]) if weights is None else float(sum(map(float, weights)))
