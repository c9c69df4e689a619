"""What a training run logs between two logs, summed over its steps and, when it is read, over its ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from dpofast.common.ranks import Ranks
from dpofast.evaluation.metrics import MetricSums, work_avoided
from dpofast.packing.pack import PackedBatch


class LogWindow:
    """Metrics since the last read.

    Attributes:
        sums: of the pairs' metrics; a step adds to them.
        num_tokens: positions computed since the start of the run, on all ranks, as of the last read.
        last_tokens: positions of the last step on this rank.
        last_targets: response tokens of the last step on this rank.
    """

    def __init__(self) -> None:
        """Start at none."""
        self.num_tokens = 0
        self.last_tokens = self.last_targets = 0
        self._restart()

    def _restart(self) -> None:
        self.sums = MetricSums()
        self._counts: Counter[str] = Counter()
        self._seconds = 0.0

    def add_step(self, examples: Sequence[Any], batches: Sequence[PackedBatch], seconds: float) -> None:
        """Add this rank's share of a step."""
        self.last_tokens = sum(batch.num_tokens for batch in batches)
        self.last_targets = sum(batch.num_targets for batch in batches)
        self._seconds += seconds
        self._counts["tokens"] += self.last_tokens
        if batches:
            self._counts.update({"shares": 1, **work_avoided(examples, batches)})  # type: ignore[dict-item]

    def state(self) -> dict[str, Any]:
        """Tensors and plain values, for a checkpoint."""
        return {**vars(self), "sums": vars(self.sums), "_counts": dict(self._counts)}

    def load(self, state: dict[str, Any]) -> None:
        """Go on with a state()."""
        vars(self.sums).update(state["sums"])
        vars(self).update({**state, "sums": self.sums, "_counts": Counter(state["_counts"])})

    def read(self, ranks: Ranks) -> dict[str, float]:
        """The means since the last read; num_tokens counts from the start. A collective."""
        metrics = self.sums.means(ranks)
        everyone = ranks.all_gather((dict(self._counts), self._seconds))
        counts: Counter[str] = sum((Counter(theirs) for theirs, _ in everyone), Counter())
        slowest = max(seconds for _, seconds in everyone)
        for name in ("padding_fraction", "shared_fraction"):
            metrics[name] = counts[name] / max(counts["shares"], 1)
        self.num_tokens += counts["tokens"]
        metrics["num_tokens"] = self.num_tokens
        metrics["tokens_per_second"] = counts["tokens"] / slowest if slowest else 0.0
        self._restart()
        return metrics
