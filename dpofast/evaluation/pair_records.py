"""PairRecords: the numbers of every pair or list of an evaluation, and the tokens of those with extreme margins.

The numbers take 120 bytes a pair or list. Tokens are kept for a few only, so that memory does not grow with the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpofast.common.ranks import Ranks
from dpofast.data.token_rows import has_lists, responses_of
from dpofast.evaluation.list_metrics import ListMetrics, list_metrics
from dpofast.losses.functional import PreferenceOutput
from dpofast.packing.batch import PackedBatch

# Pairs read back from the device at once: a transfer for each micro-batch would be a sync for each.
_READ_AT_ONCE = 4096
# How the rewards of a list order its responses; NaN for pairs.
_LIST_NAMES = tuple(name for name in ListMetrics._fields if name != "ordered")
_LIST_VALUES = np.dtype([(name, np.float64) for name in _LIST_NAMES])
# A pair's numbers as they come from the device, and as they are kept; two values are chosen and rejected.
_DEVICE_VALUES = np.dtype(
    [("rewards", np.float64, 2), ("logps", np.float64, 2), ("loss", np.float64), ("list", _LIST_VALUES)]
)
_COUNTS = [("lengths", np.int64, 2), ("responses", np.int64)]
_RECORD = np.dtype([("row", np.int64), ("index", np.int64), *_DEVICE_VALUES.descr, *_COUNTS])


@dataclass(frozen=True, eq=False)
class ListTable:
    """How rewards order the responses of P lists: ListMetrics (list_metrics.py), NaN where all responses are tied.

    responses (P,) int64: K of each; accuracy, ties, kendall_tau, ndcg, best_of_k (P,) float64.
    """

    responses: np.ndarray
    accuracy: np.ndarray
    ties: np.ndarray
    kendall_tau: np.ndarray
    ndcg: np.ndarray
    best_of_k: np.ndarray

    @classmethod
    def of(cls, metrics: ListMetrics, responses: np.ndarray) -> ListTable:
        """Those of P lists, with the number of responses of each."""
        return cls(responses, **{name: value.cpu().numpy() for name, value in metrics.values().items()})


@dataclass(frozen=True, eq=False)
class PairTable:
    """P pairs; the columns of two are chosen and rejected, of lists the best and the worst response.

    rows (P,) int64: the row or line in the source; rewards (P, 2) float64: beta times (policy minus reference
    log-prob), or without a reference beta times the policy's; logps (P, 2) float64, nats, summed over the response;
    lengths (P, 2) int64, tokens; losses (P,) float64; lists: what belongs to lists alone, None for pairs.
    """

    rows: np.ndarray
    rewards: np.ndarray
    logps: np.ndarray
    lengths: np.ndarray
    losses: np.ndarray
    lists: ListTable | None = None

    def __len__(self) -> int:
        """The number of pairs, P."""
        return len(self.rows)

    @property
    def margins(self) -> np.ndarray:
        """(P,) float64: chosen reward minus rejected reward."""
        return self.rewards[:, 0] - self.rewards[:, 1]


@dataclass(frozen=True, eq=False)
class KeptPair:
    """A pair with its tokens: place is its PairTable number; example has prompt_ids, chosen_ids, rejected_ids.

    Of a list, the latter two are its best and its worst response.
    """

    place: int
    margin: float
    example: Mapping[str, Any]


class PairRecords:
    """Collects one evaluation's pairs, micro-batch by micro-batch.

    Args:
        kept: how many pairs of the largest margins keep their tokens, and as many of the smallest.
    """

    def __init__(self, kept: int = 5) -> None:
        """Start empty."""
        self._kept = kept
        self._waiting: list[tuple[Tensor, list[Mapping[str, Any]]]] = []
        self._parts: list[np.ndarray] = []  # of _RECORD
        self._count = self._unread = 0
        self._best: list[KeptPair] = []
        self._worst: list[KeptPair] = []

    def add(self, examples: Sequence[Mapping[str, Any]], batch: PackedBatch, output: PreferenceOutput) -> None:
        """Record a micro-batch of the examples, without a device sync but for one in _READ_AT_ONCE pairs."""
        lists, ranks = batch.columns.lists, batch.columns.ranks
        logps, rewards = (output.of_pairs(name, batch.pairs, lists).double() for name in ("logps", "rewards"))
        if lists is None or ranks is None:
            of_lists = rewards.new_full((len(rewards), len(_LIST_NAMES)), torch.nan)
        else:
            of_lists = torch.stack([*list_metrics(output.of_lists("rewards", lists), ranks).values().values()], dim=1)
        values = torch.cat([rewards, logps, output.losses.double()[:, None], of_lists], dim=1)
        self._waiting.append((values.detach(), [examples[i] for i in batch.pair_examples.tolist()]))
        self._unread += len(values)
        if self._unread >= _READ_AT_ONCE:
            self._read()

    def _read(self) -> None:
        """Read back all micro-batches that wait, in one transfer."""
        if not self._waiting:
            return
        values = torch.cat([part for part, _ in self._waiting]).cpu().numpy().view(_DEVICE_VALUES)[:, 0]
        examples = [example for _, part in self._waiting for example in part]
        self._waiting, self._unread = [], 0
        records = np.empty(len(values), _RECORD)
        for name in _DEVICE_VALUES.fields or ():
            records[name] = values[name]
        records["row"] = [example["row"] for example in examples]
        records["index"] = [example.get("index", self._count + i) for i, example in enumerate(examples)]
        records["lengths"] = [(len(example["chosen_ids"]), len(example["rejected_ids"])) for example in examples]
        records["responses"] = [len(responses_of(example)) if has_lists(example) else 0 for example in examples]
        self._parts.append(records)
        margins = values["rewards"][:, 0] - values["rewards"][:, 1]
        order = np.argsort(margins, kind="stable")
        # NaN sorts last, and is no margin to show
        order = order[np.isfinite(margins[order])]
        worst, best = (
            [KeptPair(self._count + i, float(margins[i]), examples[i]) for i in chosen[: self._kept].tolist()]
            for chosen in (order, order[::-1])
        )
        self._keep(worst, best)
        self._count += len(values)

    def _keep(self, worst: list[KeptPair], best: list[KeptPair]) -> None:
        """Merge candidates into the kept pairs; of equal margins the first stays."""
        self._worst = sorted([*self._worst, *worst], key=lambda pair: (pair.margin, pair.place))[: self._kept]
        self._best = sorted([*self._best, *best], key=lambda pair: (-pair.margin, pair.place))[: self._kept]

    def table(self) -> PairTable:
        """All pairs so far, in the order they came."""
        self._read()
        records = np.concatenate(self._parts) if self._parts else np.empty(0, _RECORD)
        self._parts = [records]
        return PairTable(
            rows=records["row"],
            rewards=records["rewards"],
            logps=records["logps"],
            lengths=records["lengths"],
            losses=records["loss"],
            lists=_lists(records),
        )

    def rewards(self) -> np.ndarray:
        """(P, 2) float64, rewards of chosen and rejected in the dataset's order, whatever was packed together.

        Of lists, those of the best and the worst response.
        """
        table = self.table()
        return table.rewards[np.argsort(self._parts[0]["index"], kind="stable")]

    def joined(self, ranks: Ranks) -> PairRecords:
        """The records of all ranks, on each of them: a collective."""
        if ranks.size == 1:
            return self
        self.table()
        joined = PairRecords(self._kept)
        for records, *kept in ranks.all_gather((self._parts[0], self._worst, self._best)):
            worst, best = ([replace(pair, place=pair.place + joined._count) for pair in pairs] for pairs in kept)
            joined._keep(worst, best)
            joined._parts.append(records)
            joined._count += len(records)
        return joined

    def worst(self) -> list[KeptPair]:
        """The pairs of the smallest margins, the smallest first."""
        self._read()
        return list(self._worst)

    def best(self) -> list[KeptPair]:
        """The pairs of the largest margins, the largest first."""
        self._read()
        return list(self._best)


def _lists(records: np.ndarray) -> ListTable | None:
    """What records (P,) of _RECORD have of lists; None where there are none."""
    if not records["responses"].any():
        return None
    return ListTable(responses=records["responses"], **{name: records["list"][name] for name in _LIST_NAMES})
