"""Checks of the optional columns of data against the loss: of their names before models are loaded, then of values."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from dpofast.data.arrow import chunk_bounds, read_chunks
from dpofast.data.formats import (
    LIST_WEIGHT_COLUMN,
    RANK_COLUMN,
    ROW_COLUMNS,
    SCORE_COLUMN,
    WEIGHT_COLUMNS,
    BadRow,
    DataError,
    holds_list,
    place,
    used_columns,
)
from dpofast.data.token_rows import has_lists
from dpofast.losses.config import PreferenceLoss
from dpofast.losses.kinds import SMOOTHING_RANGES
from dpofast.losses.list_kinds import MOST_EXPONENT, MOST_TIED
from dpofast.losses.own_kinds import kind_of
from dpofast.losses.validate import check_taken, check_takes_pairs, too_large

_ROWS = 4096


def is_list_data(columns: Collection[str]) -> bool:
    """Whether data with these columns, in any format, are lists of responses and no pairs."""
    try:
        return holds_list(used_columns(columns))
    except BadRow:
        return False


def check_column_names(
    columns: Collection[str], loss: PreferenceLoss, name: str, *, list_pairs: str | None = None
) -> None:
    """Refuse columns that the loss does not take.

    Args:
        columns: of data in any format, or of a token-level dataset.
        loss: the preference loss.
        name: of the data, for messages.
        list_pairs: as DPOConfig's: lists become pairs.

    Raises:
        ValueError: a column that the loss does not take, lists for a loss of pairs, or lists without the scores, or
            pairs in place of the lists with scores, that a loss needs.
    """
    try:
        used = set(used_columns(columns))
    except BadRow:
        return  # what is wrong with them is said where the rows are read, with their place
    given = {column: column for column in ROW_COLUMNS if column in used}
    for column in (*WEIGHT_COLUMNS, LIST_WEIGHT_COLUMN):
        if column in used:
            given.setdefault("token_weights", column)
    for field, column in given.items():
        _check(
            [field],
            loss,
            f"{name}: column '{column}'",
            f"remove or rename the column ('{column}'), or name another loss_type",
        )
    if list_pairs is None and holds_list(used):
        fields = ["lists", *([SCORE_COLUMN] if SCORE_COLUMN in used else [])]
        _check(fields, loss, f"{name}: lists of responses", "on the command line: --list_pairs, --loss_type")
    else:
        try:
            check_takes_pairs(loss)
        except ValueError as error:
            made = "" if list_pairs is None else f", which list_pairs={list_pairs!r} makes of lists"
            raise ValueError(f"{name}: {error}{made}") from error


def check_data_columns(args: Any, loss: PreferenceLoss, train_dataset: Any, eval_dataset: Any) -> None:
    """check_column_names of a trainer's datasets.

    Args:
        args: a DPOConfig.
        loss: the preference loss.
        train_dataset: the training data in any format, or None.
        eval_dataset: likewise, or a dict of several.
    """
    evaluated = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
    named = {f"eval_dataset {name}".strip(): each for name, each in evaluated.items()}
    for name, each in {"train_dataset": train_dataset, **named}.items():
        columns = getattr(each, "column_names", None)
        if isinstance(columns, list):
            check_column_names(columns, loss, name, list_pairs=args.list_pairs)


def _check(fields: Collection[str], loss: PreferenceLoss, what: str, way: str) -> None:
    try:
        check_taken(fields, loss)
    except ValueError as error:
        raise ValueError(f"{what}: {error}; {way}") from error


def check_column_values(tokens: Dataset, loss: PreferenceLoss, name: str, *, unit: str = "row") -> None:
    """Refuse values that the loss does not take, each with its row; check_column_names has the names.

    Args:
        tokens: a token-level dataset.
        loss: the preference loss.
        name: of the data, for messages.
        unit: of its row numbers, as DataReport's.

    Raises:
        ValueError: a label_smoothing outside the range of a kind, more tied responses than plackett_luce takes, or
            scores too large for lipo_lambda (DataError).
    """
    columns = tokens.column_names
    if "label_smoothing" in columns:
        for kind in loss.kinds:
            if (allowed := kind_of(kind).smoothing) is None:
                continue
            for rows, values in _values(tokens, "label_smoothing"):
                for value in np.unique(values).tolist():
                    if not SMOOTHING_RANGES[allowed](value):
                        row = place(unit, int(rows[np.argmax(values == value)]))
                        raise DataError(
                            f"{name}, {row}: label_smoothing: expected a number in {allowed} for loss_type {kind!r}, "
                            f"got {value:g}"
                        )
    if "plackett_luce" in loss.kinds and has_lists(columns):
        for table in read_chunks(tokens, [RANK_COLUMN, "row"], chunk_bounds(len(tokens), _ROWS)):
            ranks = table.column(RANK_COLUMN).combine_chunks()
            owners = pc.list_parent_indices(ranks).to_numpy(zero_copy_only=False)
            pairs = np.stack([owners, ranks.flatten().to_numpy(zero_copy_only=False)], axis=1)
            tied, counts = np.unique(pairs, axis=0, return_counts=True)
            if counts.max(initial=0) > MOST_TIED:
                row = table.column("row")[int(tied[counts.argmax(), 0])].as_py()
                raise DataError(
                    f"{name}, {place(unit, row)}: plackett_luce takes up to {MOST_TIED} tied responses, "
                    f"got {counts.max()}: rank them, leave some out, or turn lists into pairs by list_pairs"
                )
    if "lipo_lambda" in loss.kinds and has_lists(columns) and SCORE_COLUMN in columns:
        for table in read_chunks(tokens, [SCORE_COLUMN, "row"], chunk_bounds(len(tokens), _ROWS)):
            scores = table.column(SCORE_COLUMN).combine_chunks()
            values = scores.flatten().to_numpy(zero_copy_only=False)
            if len(values) and values.max() / loss.score_temperature > MOST_EXPONENT:
                owner = pc.list_parent_indices(scores)[int(values.argmax())].as_py()
                row = table.column("row")[owner].as_py()
                raise DataError(f"{name}, {place(unit, row)}: scores: {too_large(float(values.max()), loss)}")


def _values(tokens: Dataset, column: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(numbers of rows, values as float64) of a column of numbers, some rows at a time."""
    for table in read_chunks(tokens, [column, "row"], chunk_bounds(len(tokens), _ROWS)):
        rows, values = (table.column(name).to_numpy() for name in ("row", column))
        yield rows, values.astype(np.float64)
