"""What an evaluation leaves of every pair: numbers for all of them, and the tokens of the best and the worst few.

Numbers take 64 bytes a pair. Tokens are kept for a handful of pairs only, so that memory does not grow with the text.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpofast.common.ranks import Ranks
from dpofast.losses.functional import PreferenceOutput
from dpofast.packing.pack import PackedBatch

# Pairs read back from the device at once: a transfer for each micro-batch would be a sync for each.
_READ_AT_ONCE = 4096


@dataclass(frozen=True, eq=False)
class PairTable:
    """P pairs; the columns of two are chosen and rejected.

    rows (P,) int64: the row or line in the source; rewards (P, 2) float64: beta times (policy minus reference
    log-prob), or without a reference beta times the policy's; logps (P, 2) float64, nats, summed over the response;
    lengths (P, 2) int64, tokens; losses (P,) float64.
    """

    rows: np.ndarray
    rewards: np.ndarray
    logps: np.ndarray
    lengths: np.ndarray
    losses: np.ndarray

    def __len__(self) -> int:
        """The number of pairs, P."""
        return len(self.rows)

    @property
    def margins(self) -> np.ndarray:
        """(P,) float64: chosen reward minus rejected reward."""
        return self.rewards[:, 0] - self.rewards[:, 1]


@dataclass(frozen=True, eq=False)
class KeptPair:
    """A pair with its tokens: place is its PairTable number; example has prompt_ids, chosen_ids, rejected_ids."""

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
        self._parts: list[np.ndarray] = []
        self._count = self._unread = 0
        # (key, place, pair): heaps whose first item is the next to be left out.
        self._best: list[tuple[float, int, KeptPair]] = []
        self._worst: list[tuple[float, int, KeptPair]] = []

    def add(self, examples: Sequence[Mapping[str, Any]], batch: PackedBatch, output: PreferenceOutput) -> None:
        """Take a micro-batch of the examples; on a GPU nothing waits for it."""
        logps, rewards = output.of_pairs("logps", batch.pairs), output.of_pairs("rewards", batch.pairs)
        values = torch.cat([rewards.double(), logps.double(), output.losses.double()[:, None]], dim=1)
        self._waiting.append((values.detach(), [examples[i] for i in batch.pair_examples.tolist()]))
        self._unread += len(values)
        if self._unread >= _READ_AT_ONCE:
            self._read()

    def _read(self) -> None:
        """One transfer for all that waits."""
        if not self._waiting:
            return
        values = torch.cat([part for part, _ in self._waiting]).cpu().numpy()
        examples = [example for _, part in self._waiting for example in part]
        self._waiting, self._unread = [], 0
        counts = [(example["row"], len(example["chosen_ids"]), len(example["rejected_ids"])) for example in examples]
        self._parts.append(np.concatenate([values, np.array(counts, np.float64)], axis=1))
        margins = values[:, 0] - values[:, 1]
        order = np.argsort(margins, kind="stable")
        # NaN sorts last, and is no margin to show
        order = order[np.isfinite(margins[order])]
        for heap, sign, candidates in ((self._worst, -1.0, order), (self._best, 1.0, order[::-1])):
            for i in candidates[: self._kept].tolist():
                pair = KeptPair(self._count + i, float(margins[i]), examples[i])
                heapq.heappush(heap, (sign * pair.margin, -pair.place, pair))
                if len(heap) > self._kept:
                    heapq.heappop(heap)
        self._count += len(values)

    def table(self) -> PairTable:
        """All pairs so far, in the order they came."""
        self._read()
        values = np.concatenate(self._parts) if self._parts else np.empty((0, 8))
        self._parts = [values]
        return PairTable(
            rows=values[:, 5].astype(np.int64),
            rewards=values[:, 0:2],
            logps=values[:, 2:4],
            lengths=values[:, 6:8].astype(np.int64),
            losses=values[:, 4],
        )

    def joined(self, ranks: Ranks) -> PairRecords:
        """The records of all ranks, on each of them: a collective."""
        if ranks.size == 1:
            return self
        self.table()
        records = PairRecords(self._kept)
        for values, worst, best in ranks.gather((self._parts[0], self._worst, self._best)):
            for heap, theirs in ((records._worst, worst), (records._best, best)):
                for key, place, pair in theirs:
                    moved = replace(pair, place=pair.place + records._count)
                    heapq.heappush(heap, (key, place - records._count, moved))
                    if len(heap) > records._kept:
                        heapq.heappop(heap)
            records._parts.append(values)
            records._count += len(values)
        return records

    def worst(self) -> list[KeptPair]:
        """The pairs of the smallest margins, the smallest first."""
        self._read()
        return [pair for *_, pair in sorted(self._worst, reverse=True)]

    def best(self) -> list[KeptPair]:
        """The pairs of the largest margins, the largest first."""
        self._read()
        return [pair for *_, pair in sorted(self._best, reverse=True)]
