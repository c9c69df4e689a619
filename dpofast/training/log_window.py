"""Metrics accumulated between two training logs: over steps here, and over ranks when they are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dpofast.checkpointing.zero import whole_shape
from dpofast.common.ranks import Ranks
from dpofast.evaluation.metrics import MetricSums, work_avoided
from dpofast.model.parts import beside_text
from dpofast.packing.batch import PackedBatch


class LogWindow:
    """Metrics since the last read.

    Args:
        padded: micro-batches run as padded rows.

    Attributes:
        sums: sums of the pairs' metrics, to which every step adds.
        num_tokens: positions computed since the start of the run, on all ranks, as of the last read.
        last_tokens: positions of the last step on this rank.
        last_targets: response tokens of the last step on this rank.
    """

    def __init__(self, *, padded: bool = False) -> None:
        """Start with no step."""
        self._padded = padded
        self.num_tokens = 0
        self.last_tokens = self.last_targets = 0
        self._restart()

    def _restart(self) -> None:
        self.sums = MetricSums()
        self._counts: Counter[str] = Counter()
        self._seconds = 0.0

    @property
    def has_steps(self) -> bool:
        """Whether this rank has added a step since the last read."""
        return self._seconds > 0

    def add_step(self, examples: Sequence[Any], batches: Sequence[PackedBatch], seconds: float) -> None:
        """Add this rank's share of a step."""
        self.last_tokens = sum(batch.num_tokens for batch in batches)
        self.last_targets = sum(batch.num_targets for batch in batches)
        self._seconds += seconds
        self._counts["tokens"] += self.last_tokens
        if batches:
            self._counts.update({"shares": 1, **work_avoided(examples, batches, padded=self._padded)})  # type: ignore[dict-item]

    def state_dict(self) -> dict[str, Any]:
        """Returns tensors and plain values that load_state_dict() restores."""
        return {
            "num_tokens": self.num_tokens,
            "last_tokens": self.last_tokens,
            "last_targets": self.last_targets,
            "metrics": self.sums.state_dict(),
            "counts": dict(self._counts),
            "seconds": self._seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what state_dict() returned."""
        self.num_tokens, self.last_tokens, self.last_targets = (
            state[name] for name in ("num_tokens", "last_tokens", "last_targets")
        )
        self.sums.load_state_dict(state["metrics"])
        self._counts, self._seconds = Counter(state["counts"]), state["seconds"]

    def read(self, ranks: Ranks) -> dict[str, float]:
        """Returns means over the pairs since the last read, and num_tokens since the start; restarts. A collective."""
        metrics = self.sums.means(ranks)
        everyone = ranks.all_gather((dict(self._counts), self._seconds))
        counts: Counter[str] = sum((Counter(theirs) for theirs, _ in everyone), Counter())
        slowest = max(seconds for _, seconds in everyone)
        for name in ("padding_avoided", "sharing_avoided"):
            metrics[name] = counts[name] / max(counts["shares"], 1)
        self.num_tokens += counts["tokens"]
        metrics["num_tokens"] = self.num_tokens
        metrics["tokens_per_second"] = counts["tokens"] / slowest if slowest else 0.0
        self._restart()
        return metrics


def merged_windows(states: Sequence[dict[str, Any]], first: bool) -> dict[str, Any]:
    """Returns one state_dict() of all ranks', for another number of ranks.

    Args:
        states: of every rank.
        first: for the first rank, which gets the sums; the others' begin empty.
    """
    sums = MetricSums()
    for state in states if first else ():
        part = MetricSums()
        part.load_state_dict(state["metrics"])
        sums.add_all(part)
    counts: Counter[str] = sum((Counter(state["counts"]) for state in states if first), Counter())
    return {
        **states[0],
        "metrics": sums.state_dict(),
        "counts": dict(counts),
        "seconds": max(state["seconds"] for state in states),  # on all: whether there were steps
    }


def step_flops(model: Any, tokens: int, targets: int) -> float:
    """6·parameters·positions of a step: `tokens` through the backbone, `targets` through the LM head.

    Of a composite model the language model counts; its encoders see pixels.
    """
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    backbone = sum(map(_count, model.parameters())) - _count(embeddings)
    backbone -= sum(map(_count, beside_text(model)))
    if embeddings is not head:
        backbone -= _count(head)
    return 6.0 * (backbone * tokens + _count(head) * targets)


def _count(weight: Tensor) -> int:
    return whole_shape(weight).numel()
