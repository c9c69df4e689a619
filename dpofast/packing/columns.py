"""What examples say beside their responses, checked: the order of lists, numbers of rows, weights of tokens.

FlatColumns holds them for all examples of a call, and gathers those of a micro-batch as PreferenceColumns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dpofast import _C
from dpofast.data.columns import ROW_NUMBERS
from dpofast.data.formats import (
    LIST_REF_COLUMN,
    LIST_WEIGHT_COLUMN,
    RANK_COLUMN,
    REF_COLUMNS,
    ROW_COLUMNS,
    SCORE_COLUMN,
    WEIGHT_COLUMNS,
)
from dpofast.data.token_rows import weight_names
from dpofast.losses.columns import PreferenceColumns
from dpofast.packing.sources import Ragged, Source, check_counts

# Of a list, what is given for its responses in the place of these.
_OF_PAIRS = {**dict.fromkeys(WEIGHT_COLUMNS, LIST_WEIGHT_COLUMN), **dict.fromkeys(REF_COLUMNS, LIST_REF_COLUMN)}
PAIR_COLUMNS = (*ROW_COLUMNS, *WEIGHT_COLUMNS)
LIST_COLUMNS = (*ROW_COLUMNS, RANK_COLUMN, SCORE_COLUMN, LIST_WEIGHT_COLUMN, LIST_REF_COLUMN, *_OF_PAIRS)

# How a message says what a number of a row has to be, and what a null is.
_ROW_RULES: dict[str, tuple[str, float | None]] = {
    "weight": ("0 or more", 1.0),
    "margin": ("finite", 0.0),
    "beta": ("above 0", None),
    "label_smoothing": ("in [0, 1)", None),
}


@dataclass(frozen=True, eq=False)
class ListOrder:
    """The responses of E lists, best first.

    Attributes:
        members: (M,) int64, the responses of one list after another, numbered from 0 in each.
        counts: (E,) int64, the responses of each list.
        ranks: (M,) int64 of the members: from 0, which is the best, without gaps; equal ones are tied.
        scores: (M,) float32 of the members, or None.
    """

    members: np.ndarray
    counts: np.ndarray
    ranks: np.ndarray
    scores: np.ndarray | None


@dataclass(frozen=True, eq=False)
class TokenWeights:
    """A weight for every token of every sequence (1 for prompts).

    Attributes:
        values: (sum of lengths,) float32, of one sequence after another.
        lengths: (n,) int64, tokens of each sequence.
        variants: (n,) int64: 0 for a sequence whose weights are all 1; otherwise equal for equal weights only.
    """

    values: np.ndarray
    lengths: np.ndarray
    variants: np.ndarray

    def gather(self, sequences: np.ndarray) -> np.ndarray:
        """Those of some sequences, one after another, float32."""
        starts, lengths = (self.lengths.cumsum() - self.lengths)[sequences], self.lengths[sequences]
        shift = starts - (lengths.cumsum() - lengths)
        return self.values[np.repeat(shift, lengths) + np.arange(lengths.sum())]


@dataclass(frozen=True, eq=False)
class FlatColumns:
    """The columns of all examples of a call.

    Attributes:
        rows: (E,) float32 by the names of ROW_COLUMNS; those that the data have.
        order: of lists; None for pairs.
        weights: of tokens; None where all are 1.
    """

    rows: dict[str, np.ndarray]
    order: ListOrder | None
    weights: TokenWeights | None

    @property
    def given(self) -> bool:
        """Whether there are any."""
        return bool(self.rows) or self.order is not None or self.weights is not None

    def of_batch(
        self, examples: Tensor, sequences: np.ndarray, lists: Tensor | None, ranks: Tensor | None
    ) -> PreferenceColumns:
        """The columns of a micro-batch.

        Args:
            examples: (P,) int64, the example of each pair or list.
            sequences: (S,) int64, the input sequence of each sequence.
            lists, ranks: (P * K,) int32 of lists, filled with -1; None for pairs.
        """
        index, scores = examples.numpy(), None
        if lists is not None and ranks is not None:
            lists, ranks = lists.view(len(index), -1), ranks.view(len(index), -1)
            if self.order is not None and self.order.scores is not None:
                starts = (self.order.counts.cumsum() - self.order.counts)[index]
                places = np.minimum(starts[:, None] + np.arange(lists.shape[1]), len(self.order.scores) - 1)
                scores = torch.from_numpy(np.where(lists.numpy() < 0, np.float32(0), self.order.scores[places]))
        return PreferenceColumns(
            **{name: torch.from_numpy(values[index]) for name, values in self.rows.items()},
            token_weights=None if self.weights is None else torch.from_numpy(self.weights.gather(sequences)),
            lists=lists,
            ranks=ranks,
            scores=scores,
        )


def read_row_columns(source: Source, count: int) -> dict[str, np.ndarray]:
    """The columns of ROW_COLUMNS that there are, each (count,) float32.

    Raises:
        ValueError: a number out of its range, or no beta or label_smoothing in some rows only.
    """
    columns = {}
    for name in ROW_COLUMNS:
        (expected, null), number = _ROW_RULES[name], ROW_NUMBERS[name]
        column = source.floats(name)
        if column is None:
            continue
        if null is None and not column.given.all():
            row = int((~column.given).argmax())
            raise ValueError(f"examples[{row}]: no {name}, unlike other examples; give it for every row or for none")
        values = np.full(count, null or 0, np.float32)
        values[column.given] = _float32(column.values)
        bad = ~((values >= np.float32(number.least)) & (values <= np.float32(number.most)))
        if bad.any():
            row = int(bad.argmax())
            got = column.values[column.given[:row].sum()]
            raise ValueError(f"examples[{row}]: {name}: expected a number that is {expected}, got {got}")
        columns[name] = values
    return columns


def refuse_columns_of_pairs(source: Source) -> None:
    """ValueError where lists bring a column of pairs, and not that of lists in its place."""
    for name, of_lists in _OF_PAIRS.items():
        if source.has(name) and not source.has(of_lists):
            raise ValueError(f"examples: {name} beside responses_ids; a list takes {of_lists}, one a response")


def read_order(source: Source, counts: np.ndarray) -> ListOrder:
    """The order of lists of these numbers of responses by their ranks, where they have none by their scores; stable.

    Raises:
        ValueError: fewer than two responses, neither ranks nor scores, another number of them, one that is not finite,
            all tied, ranks that contradict scores, or scores of some lists only.
    """
    if len(counts) and counts.min() < 2:
        row = int(counts.argmin())
        raise ValueError(f"examples[{row}]: responses_ids: expected two responses or more, got {counts[row]}")
    ranks, scores = (_of_responses(source, name, counts) for name in (RANK_COLUMN, SCORE_COLUMN))
    owners, starts = np.repeat(np.arange(len(counts)), counts), counts.cumsum() - counts
    if np.isnan(rank := np.where(np.isnan(ranks), -scores, ranks)).any():
        row = int(owners[np.isnan(rank).argmax()])
        raise ValueError(f"examples[{row}]: responses_ids needs ranks (1 is the best) or scores (larger is better)")
    scored = ~np.isnan(scores)
    if scored.any() and not scored.all():
        row = int(owners[scored.argmin()])
        raise ValueError(f"examples[{row}]: no scores, unlike other examples; give them for all lists or for none")
    if scored.any():
        _refuse_contradictions(rank, scores, owners, starts)
    order = np.lexsort((rank, owners))
    step = np.diff(rank[order], prepend=np.nan) != 0
    step[starts] = False
    dense = step.cumsum()
    dense -= np.repeat(dense[starts], counts)
    tied = dense[starts + counts - 1] == 0
    if tied.any():
        row = int(tied.argmax())
        raise ValueError(
            f"examples[{row}]: all {counts[row]} responses are tied; expected one that is better than another"
        )
    return ListOrder(
        members=order - starts[owners],
        counts=counts,
        ranks=dense.astype(np.int64),
        scores=scores[order].astype(np.float32) if scored.any() else None,
    )


def _of_responses(source: Source, name: str, counts: np.ndarray) -> np.ndarray:
    """A number for each response, (M,) float64, scores rounded to float32; NaN in lists that have none."""
    column = source.lists(name)
    values = np.full(counts.sum(), np.nan)
    if column is None:
        return values
    check_counts(name, column.given, column.counts, counts, "numbers, one a response")
    found = _float32(column.values) if name == SCORE_COLUMN else column.values
    values[np.repeat(column.given, counts)] = found
    bad = ~np.isfinite(found)
    if bad.any():
        place = int(bad.argmax())
        row, k = _owner(column.counts, place)
        raise ValueError(f"examples[{row}]: {name}[{k}]: expected a finite number, got {column.values[place]}")
    return values


def _refuse_contradictions(ranks: np.ndarray, scores: np.ndarray, owners: np.ndarray, starts: np.ndarray) -> None:
    """ValueError if a response with a better rank than another's has a lower score."""
    order = np.lexsort((-scores, ranks, owners))
    wrong = np.diff(scores[order], prepend=np.nan) > 0  # among ties the scores fall
    wrong[starts] = False
    if wrong.any():
        worse = int(wrong.argmax())
        row = int(owners[order[worse]])
        better, worse = (int(order[place]) for place in (worse - 1, worse))
        names = [f"responses_ids[{place - starts[row]}]" for place in (better, worse)]
        raise ValueError(
            f"examples[{row}]: ranks and scores contradict each other: {names[0]} has the better rank "
            f"({ranks[better]:g}, not {ranks[worse]:g}) and the lower score ({scores[better]:g}, not "
            f"{scores[worse]:g}) than {names[1]}; a smaller rank and a larger score are better"
        )


def read_ref_logps(source: Source, counts: np.ndarray) -> np.ndarray | None:
    """Reference log-probs of all responses of lists, nats: (M,) float64, or None.

    Raises:
        ValueError: of some lists only, another number, or one that is not finite.
    """
    column = source.lists(LIST_REF_COLUMN)
    if column is None:
        return None
    if not column.given.all():
        row = int(column.given.argmin())
        raise ValueError(
            f"examples[{row}]: no reference log-probs, unlike other examples; give them for all examples or none"
        )
    check_counts(LIST_REF_COLUMN, column.given, column.counts, counts, "floats, one a response")
    bad = ~np.isfinite(column.values)
    if bad.any():
        row, k = _owner(counts, int(bad.argmax()))
        got = column.values[bad.argmax()]
        raise ValueError(f"examples[{row}]: {LIST_REF_COLUMN}[{k}]: expected a finite float, got {got}")
    return column.values


def read_token_weights(
    source: Source, ids: _C.Sequences, branch_counts: np.ndarray, *, lists: bool
) -> TokenWeights | None:
    """The weights of all tokens, from responses_weights of lists, chosen_weights and rejected_weights of pairs.

    Args:
        source: the columns.
        ids: of every example its prompt and its branches.
        branch_counts: (E,) int64.
        lists: whether the examples are lists.

    Raises:
        ValueError: a negative weight, one that is not finite, none above 0 in a response, or another number than the
            response has tokens.
    """
    if not any(map(source.has, weight_names(lists=lists))):
        return None
    lengths, prompts = ids.lengths(), (branch_counts + 1).cumsum() - branch_counts - 1
    weights = np.ones(lengths.sum(), np.float32)
    if lists:
        responses = np.delete(np.arange(len(lengths)), prompts)
        column = source.nested(LIST_WEIGHT_COLUMN, branch_counts)

        def response_name(response: int) -> str:
            row, k = _owner(branch_counts, response)
            return f"examples[{row}]: {LIST_WEIGHT_COLUMN}[{k}]"

        _put_weights(weights, lengths, column, responses, response_name)
    else:
        for k, key in enumerate(WEIGHT_COLUMNS):
            _put_weights(weights, lengths, source.lists(key), prompts + 1 + k, partial(_row_name, key))
    starts = lengths.cumsum() - lengths
    weighted = np.unique(np.searchsorted(starts + lengths, (weights != 1).nonzero()[0], side="right"))
    # Numbered by content, so that the plan does not depend on the order of the examples.
    contents = {s: weights[starts[s] : starts[s] + lengths[s]].tobytes() for s in weighted.tolist()}
    numbers = {content: number for number, content in enumerate(sorted(set(contents.values())), 1)}
    variants = np.zeros(len(lengths), np.int64)
    for sequence, content in contents.items():
        variants[sequence] = numbers[content]
    return TokenWeights(weights, lengths, variants) if contents else None


def _put_weights(
    weights: np.ndarray,
    lengths: np.ndarray,
    column: Ragged | None,
    sequences: np.ndarray,
    name: Callable[[int], str],
) -> None:
    """Write a column's weights of these sequences into those of all tokens; name(i) names item i of the column."""
    if column is None:
        return
    expected = lengths[sequences]
    wrong = column.given & (column.counts != expected)
    if wrong.any():
        item = int(wrong.argmax())
        raise ValueError(
            f"{name(item)}: expected {expected[item]} numbers, one a token of the response, got {column.counts[item]}"
        )
    values = _float32(column.values)
    bad = ~((values >= 0) & np.isfinite(values))
    if bad.any():
        item, token = _owner(column.counts, int(bad.argmax()))
        got = column.values[bad.argmax()]
        raise ValueError(f"{name(item)}[{token}]: expected a finite number of 0 or more, got {got}")
    items = np.repeat(np.arange(len(column.counts)), column.counts)
    empty = (np.bincount(items[values > 0], minlength=len(column.counts)) == 0) & (column.counts > 0)
    if empty.any():
        raise ValueError(f"{name(int(empty.argmax()))}: all weights are 0; expected a token that counts")
    shift = (lengths.cumsum() - lengths)[sequences] - (column.counts.cumsum() - column.counts)
    weights[np.repeat(shift, column.counts) + np.arange(len(values))] = values + np.float32(0)  # -0.0 becomes 0.0


def _row_name(key: str, row: int) -> str:
    return f"examples[{row}]: {key}"


def _float32(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def _owner(counts: np.ndarray, place: int) -> tuple[int, int]:
    """The list that a place among all items lies in, and its place there."""
    ends = counts.cumsum()
    row = int(np.searchsorted(ends, place, side="right"))
    return row, place - int(ends[row] - counts[row])
