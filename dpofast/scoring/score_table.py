"""score_table: what an evaluation reports of scored rows, computed from their scores and their other columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dpofast.data.arrow import chunk_bounds, read_chunks
from dpofast.data.formats import LIST_REF_COLUMN, ORDER_COLUMN, RANK_COLUMN, REF_COLUMNS, ROW_COLUMNS, SCORE_COLUMN
from dpofast.data.token_rows import RowTokens, has_lists, token_columns, weight_columns
from dpofast.evaluation.list_metrics import list_metrics
from dpofast.evaluation.pair_records import ListTable, PairTable
from dpofast.losses.columns import PreferenceColumns
from dpofast.losses.config import PreferenceLoss
from dpofast.losses.functional import preference_loss

_ROWS = 1024


def score_table(scores: Sequence[Mapping[str, Any]], tokens: Dataset, loss: PreferenceLoss) -> PairTable:
    """Losses, rewards and, of lists, how they order the responses.

    Args:
        scores: of score_rows, one for each row of tokens, in their order.
        tokens: the token-level dataset that was scored, with its columns weight, margin, beta and the like.
        loss: a loss of sequence log-probs (preference_loss).
    """
    names = tokens.column_names
    is_list = has_lists(names)
    order = tokens[ORDER_COLUMN] if is_list else [(0, 1)] * len(scores)
    counts = torch.tensor([len(places) for places in order])
    member = torch.arange(int(counts.max())) < counts[:, None]

    def values(of_list: str, *of_pair: str) -> Tensor:
        """(P, K) float64 of every row's responses, best first; 0 where there are none."""
        if (of_list if is_list else of_pair[0]) not in scores[0]:
            return torch.zeros(member.shape, dtype=torch.float64)
        if is_list:
            pairs = zip(scores, order, strict=True)
            return _padded([[score[of_list][place] for place in places] for score, places in pairs])
        return _padded([[score[name] for name in of_pair] for score in scores])

    logps = values("responses_logps", "chosen_logps", "rejected_logps")
    lengths = values("responses_tokens", "chosen_tokens", "rejected_tokens")
    sequences = torch.where(member, torch.arange(member.numel()).view(member.shape), -1)
    pairs = torch.cat([sequences[:, :1], sequences.gather(1, counts[:, None] - 1)], dim=1)
    columns = _columns(tokens, sequences if is_list else None)
    output = preference_loss(
        logps.ravel(),
        pairs,
        values(LIST_REF_COLUMN, *REF_COLUMNS).ravel(),
        loss=loss,
        lengths=_counted(tokens, lengths, member).ravel(),
        columns=columns,
    )
    lists = None
    if columns.ranks is not None:
        lists = ListTable.of(list_metrics(output.of_lists("rewards", sequences), columns.ranks), counts.numpy())
    return PairTable(
        rows=np.asarray(tokens["row"], np.int64),
        rewards=output.of_pairs("rewards", pairs, columns.lists).numpy(),
        logps=logps.ravel()[pairs].numpy(),
        lengths=lengths.ravel()[pairs].numpy().astype(np.int64),
        losses=output.losses.numpy(),
        lists=lists,
    )


def _padded(rows: Sequence[Sequence[float]], fill: float = 0.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return pad_sequence([torch.tensor(row, dtype=dtype) for row in rows], batch_first=True, padding_value=fill)


def _columns(tokens: Dataset, sequences: Tensor | None) -> PreferenceColumns:
    """The optional columns of all rows; sequences (P, K) numbers those of lists."""
    rows = {name: torch.tensor(tokens[name]) for name in ROW_COLUMNS if name in tokens.column_names}
    if sequences is None:
        return PreferenceColumns(**rows)
    scores = _padded(tokens[SCORE_COLUMN], 0.0, torch.float32) if SCORE_COLUMN in tokens.column_names else None
    ranks = _padded(tokens[RANK_COLUMN], -1, torch.int32)
    return PreferenceColumns(**rows, lists=sequences.int(), ranks=ranks, scores=scores)


def _counted(tokens: Dataset, lengths: Tensor, member: Tensor) -> Tensor:
    """(P, K) float64: what the tokens of every response count together, their number or the sum of their weights."""
    weights = weight_columns(tokens.column_names)
    if not weights:
        return lengths
    sums = []
    columns = (*token_columns(tokens.column_names), *weights)
    for table in read_chunks(tokens, columns, chunk_bounds(len(tokens), _ROWS)):
        rows = RowTokens.of(table)
        given = rows.weights()
        starts = np.cumsum(rows.lengths) - rows.lengths
        sums.append(rows.lengths if given is None else np.add.reduceat(given.astype(np.float64), starts))
    counted = torch.zeros_like(lengths)
    counted[member] = torch.from_numpy(np.concatenate(sums).astype(np.float64))
    return counted
