"""Lists of K responses to one prompt: their order from best to worst, and the pairs that they give.

A list is stored best first: `ranks` from 0, dense and never falling, where equal ranks are tied; `scores`, where the
data have them; `order`, the place of every response in the row of the source.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features

from dpofast.common.printable import printable
from dpofast.data.arrow import mapped_files, release_pages
from dpofast.data.formats import (
    ID_COLUMNS,
    LIST_ID_COLUMNS,
    LIST_REF_COLUMN,
    LIST_WEIGHT_COLUMN,
    ORDER_COLUMN,
    RANK_COLUMN,
    REF_COLUMNS,
    SCORE_COLUMN,
    WEIGHT_COLUMNS,
    BadRow,
    DataError,
    holds_list,
)
from dpofast.data.images.columns import IMAGES
from dpofast.data.report import DataReport, NoUsableRow

LIST_PAIRS = ("all", "best_worst", "adjacent")
# Of a batch that is turned into pairs: K responses give K (K - 1) / 2 of them, each with its row's images.
_ROWS, _ROWS_WITH_IMAGES = 256, 16
# The columns of a list that have a value for every response, and the two columns of a pair that they become.
OF_RESPONSES = {
    LIST_ID_COLUMNS[1]: ID_COLUMNS[1:],
    LIST_REF_COLUMN: REF_COLUMNS,
    LIST_WEIGHT_COLUMN: WEIGHT_COLUMNS,
}
_CODE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


class Ranking(NamedTuple):
    """Responses from best to worst: their places in the row, dense ranks from 0, and scores or None."""

    order: list[int]
    ranks: list[int]
    scores: list[float] | None


def with_best_and_worst(example: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an example of a list with its first and last response as chosen_ids and rejected_ids; others as they are.

    Nothing is copied but the mapping.
    """
    if LIST_ID_COLUMNS[1] not in example:
        return example
    responses = example[LIST_ID_COLUMNS[1]]
    return {**example, ID_COLUMNS[1]: responses[0], ID_COLUMNS[2]: responses[-1]}


def ranking(count: int, ranks: Sequence[float] | None, scores: Sequence[float] | None) -> Ranking:
    """Rank `count` responses by their ranks (smaller is better) or else by their scores (larger is better).

    Scores are compared as the float32 numbers that they are stored as. Tied responses are ordered by their scores, then
    as they stand in the row.

    Raises:
        BadRow: fewer than two responses, all tied, or a better rank for a lower score.
    """
    if count < 2:
        raise BadRow("a list holds fewer than two responses", f"got {count}; a row is a comparison")
    rounded = None if scores is None else np.asarray(scores, dtype=np.float32).tolist()
    if ranks is not None:
        given = list(ranks)
        if rounded is not None:
            _check_agree(given, rounded)
    else:
        assert rounded is not None
        given = [-score for score in rounded]
    if len(set(given)) == 1:
        raise BadRow("all responses of a list are tied", f"all {count} have one rank or score: nothing is preferred")
    dense = {value: rank for rank, value in enumerate(sorted(set(given)))}
    order = sorted(range(count), key=lambda place: (given[place], 0.0 if rounded is None else -rounded[place]))
    return Ranking(
        order,
        [dense[given[place]] for place in order],
        None if rounded is None else [rounded[place] for place in order],
    )


def _check_agree(ranks: Sequence[float], scores: Sequence[float]) -> None:
    for one, other in combinations(range(len(ranks)), 2):
        if (ranks[one] - ranks[other]) * (scores[one] - scores[other]) > 0:
            better, worse = (one, other) if ranks[one] < ranks[other] else (other, one)
            raise BadRow(
                "ranks contradict scores",
                f"response {better} (counted from 0) has rank {ranks[better]:g} and score {scores[better]:g}, response "
                f"{worse} rank {ranks[worse]:g} and score {scores[worse]:g}; smaller ranks and larger scores are "
                "better: leave one of the columns out, or negate it",
            )


def check_list_options(list_pairs: str | None, min_score_gap: float | None) -> None:
    """Raise ValueError unless both are as documented in tokenize_preferences."""
    if list_pairs is not None and list_pairs not in LIST_PAIRS:
        raise ValueError(f"list_pairs: expected one of {LIST_PAIRS}, or None to keep lists, got {list_pairs!r}")
    if min_score_gap is None:
        return
    if isinstance(min_score_gap, bool) or not 0 <= min_score_gap < math.inf:
        raise ValueError(f"min_score_gap: expected a finite number of 0 or more, got {min_score_gap!r}")
    if list_pairs is None:
        raise ValueError(
            f"min_score_gap: {min_score_gap!r} is the least gap of the pairs that list_pairs makes of lists: set "
            f"list_pairs too, to one of {LIST_PAIRS}"
        )


def pairs_of(
    ranks: Sequence[int], scores: Sequence[float] | None, which: str, min_score_gap: float | None
) -> list[tuple[int, int]]:
    """Return the places (better, worse) of a list's pairs; the list is best first.

    Args:
        ranks: dense and never falling.
        scores: or None; needed for min_score_gap.
        which: "all" pairs of different ranks, "best_worst": the first and the last response, or "adjacent": neighbours
            of different ranks.
        min_score_gap: the least difference of a pair's scores. One that equals it but for the rounding of both scores
            to float32 counts.
    """
    last = len(ranks) - 1
    found = {"all": combinations(range(last + 1), 2), "best_worst": [(0, last)], "adjacent": pairwise(range(last + 1))}
    pairs = [(one, other) for one, other in found[which] if ranks[one] < ranks[other]]
    if min_score_gap is None:
        return pairs
    assert scores is not None
    # Rounding moves a score by half a unit in the last place, 2^-24 of it at most; twice that is allowed.
    return [
        (one, other)
        for one, other in pairs
        if scores[one] - scores[other] >= min_score_gap - 2**-23 * (abs(scores[one]) + abs(scores[other]))
    ]


@dataclass(frozen=True, kw_only=True)
class _Pairs:
    """The function given to datasets.map, which hashes its fields into the fingerprint of the cached result."""

    list_pairs: str
    min_score_gap: float | None
    files: tuple[str, ...]
    code: str = _CODE

    def __call__(self, table: pa.Table) -> pa.Table:
        table = table.combine_chunks()
        ranks = table.column(RANK_COLUMN).to_pylist()
        has_scores = SCORE_COLUMN in table.column_names
        scores = table.column(SCORE_COLUMN).to_pylist() if has_scores else [None] * len(ranks)
        # Row of the list, and places of the better and the worse response among the responses of all rows.
        taken: list[tuple[int, int, int]] = []
        first = 0
        for row, (own_ranks, own_scores) in enumerate(zip(ranks, scores, strict=True)):
            pairs = pairs_of(own_ranks, own_scores, self.list_pairs, self.min_score_gap)
            taken += [(row, first + better, first + worse) for better, worse in pairs]
            first += len(own_ranks)
        rows, better, worse = (pa.array([pair[slot] for pair in taken], pa.int64()) for slot in range(3))
        columns: dict[str, Any] = {}
        for name in table.column_names:
            values = table.column(name)
            if name in OF_RESPONSES:
                flat = _of_all_responses(values, ranks)
                for target, places in zip(OF_RESPONSES[name], (better, worse), strict=True):
                    columns[target] = flat.take(places)
            elif name not in (RANK_COLUMN, SCORE_COLUMN, ORDER_COLUMN):
                columns[name] = values.take(rows)
        release_pages(self.files)
        return pa.table(columns)


def _of_all_responses(values: pa.ChunkedArray, ranks: Sequence[Sequence[int]]) -> pa.Array:
    """The values of all rows' responses one behind the other; of a row that holds null, a null for each response."""
    lists = values.combine_chunks() if values.num_chunks != 1 else values.chunk(0)
    if not lists.null_count:
        return lists.flatten()
    places: list[int | None] = []
    first = 0
    for is_given, own in zip(lists.is_valid().to_pylist(), ranks, strict=True):
        places += range(first, first + len(own)) if is_given else [None] * len(own)
        first += len(own) if is_given else 0
    return lists.flatten().take(pa.array(places, pa.int64()))


def check_pairs_can_be_made(columns: Collection[str], list_pairs: str | None, min_score_gap: float | None) -> None:
    """Raise DataError where the options of pairs are given for rows that are pairs, or that have no scores."""
    if list_pairs is None:
        return
    if not holds_list(columns):
        raise DataError(f"list_pairs={list_pairs!r} turns lists into pairs, and the rows are pairs: leave it out")
    if min_score_gap is not None and SCORE_COLUMN not in columns:
        raise DataError(
            f"min_score_gap={min_score_gap:g} needs column '{SCORE_COLUMN}', and the lists have ranks alone"
        )


def lists_to_pairs(
    lists: Dataset, list_pairs: str, min_score_gap: float | None, report: DataReport
) -> tuple[Dataset, DataReport]:
    """Turn a token-level dataset of lists into one of pairs, row numbers kept.

    The columns of a row go to each of its pairs, those of a response to the pairs that it is in.

    Returns:
        The pairs, and the lists' report with the number of pairs, and the lists that give none as skipped.

    Raises:
        DataError: no list gives a pair.
    """
    features: dict[str, Any] = {}
    for name, feature in lists.features.items():
        if name in OF_RESPONSES:
            features |= dict.fromkeys(OF_RESPONSES[name], feature.feature)
        elif name not in (RANK_COLUMN, SCORE_COLUMN, ORDER_COLUMN):
            features[name] = feature
    pairs = lists.with_format("arrow").map(
        _Pairs(list_pairs=list_pairs, min_score_gap=min_score_gap, files=mapped_files(lists)),
        batched=True,
        batch_size=_ROWS_WITH_IMAGES if IMAGES in lists.column_names else _ROWS,
        remove_columns=lists.column_names,
        features=Features(features),
        desc=printable(f"Pairs of {report.source}"),
    )
    own, found = (np.asarray(dataset.data.table.column("row")) for dataset in (lists, pairs))
    reason = f"no two responses of different ranks are min_score_gap={min_score_gap} apart"
    report = report.as_pairs(len(pairs), np.setdiff1d(own, found).tolist(), reason)
    if len(pairs) == 0:
        raise NoUsableRow(report)
    return pairs.with_format(None), report
