"""ScoredLogits: what trl before 1.15 gets in place of a model's logits: per-token values, without the vocabulary.

There trl computes losses and metrics from full logits. ScoredLogits supports the operations that its trainer applies to
them: slicing, chunking and masking act on the per-token values, and what trl reads of the vocabulary (log-probs,
entropy, mean, arg max, log-sum-exp) is one of those values. trl's own code computes every loss and metric. Any other
operation raises an error that names it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import ModelOutput

from dpofast.common.constants import IGNORE_INDEX


@dataclass
class ScoredOutput(ModelOutput):
    """A model's output whose logits are ScoredLogits; log_probs is a field of it so that DDP finds a tensor."""

    loss: Tensor | None = None
    logits: Any = None
    log_probs: Tensor | None = None
    aux_loss: Tensor | None = None


class ScoredLogits:
    """Stands for logits (rows, width, V), up to a constant a row: position t predicts token t + 1.

    Attributes:
        values: (rows, width) each: "labels" (-100 where nothing is scored), "log_probs" and the computed statistics.
        vocab: V.
        scale: what the logits were multiplied by: 1, or 2 for the sum of squared probabilities.
    """

    def __init__(self, values: dict[str, Tensor], vocab: int, scale: float = 1.0) -> None:
        """Keep the values as they are."""
        self.values, self.vocab, self.scale = values, vocab, scale

    def _each(self, function: Callable[[Tensor], Tensor], scale: float | None = None) -> ScoredLogits:
        values = {name: function(value) for name, value in self.values.items()}
        return ScoredLogits(values, self.vocab, self.scale if scale is None else scale)

    def _value(self, name: str, asked: str) -> Tensor:
        if name not in self.values or self.scale != 1.0:
            raise ValueError(
                f"patch_trl(): {asked} was asked of logits that are never built, where it was not computed: "
                "unpatch_trl() for this use of trl"
            )
        return self.values[name]

    # ---- what slices and moves --------------------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        """(rows, width, V), or what slicing left of it."""
        return torch.Size((*self.values["labels"].shape, self.vocab))

    @property
    def device(self) -> torch.device:
        """The values' device."""
        return self.values["labels"].device

    @property
    def dtype(self) -> torch.dtype:
        """float32, the log-probs' dtype, whatever the model's is."""
        return self.values["log_probs"].dtype

    def size(self, dim: int) -> int:
        """As Tensor.size."""
        return self.shape[dim]

    def __getitem__(self, index: Any) -> ScoredLogits:
        """Index rows and positions, by slices or a mask; the vocabulary only as a whole."""
        if isinstance(index, tuple) and Ellipsis in [part for part in index if not isinstance(part, Tensor)]:
            if index[-1] != slice(None):
                raise ValueError("patch_trl(): a part of the vocabulary was asked of logits that are never built")
            index = index[:-1]
        return self._each(lambda value: value[index])

    def contiguous(self) -> ScoredLogits:
        """Itself."""
        return self

    def detach(self) -> ScoredLogits:
        """Without a gradient."""
        return self._each(Tensor.detach)

    def chunk(self, chunks: int, dim: int = 0) -> tuple[ScoredLogits, ...]:
        """Split rows or positions."""
        if dim not in (0, 1):
            raise ValueError(f"patch_trl(): chunks of logits that are never built: expected dim 0 or 1, got {dim}")
        parts = {name: value.chunk(chunks, dim) for name, value in self.values.items()}
        count = len(parts["labels"])
        return tuple(ScoredLogits({name: part[i] for name, part in parts.items()}, self.vocab) for i in range(count))

    def __rmul__(self, scale: float) -> ScoredLogits:
        """Multiply the scale, which logsumexp reads."""
        return self._each(lambda value: value, scale=self.scale * scale)

    # ---- what reads the vocabulary ----------------------------------------------------------------------------------

    def mean(self, dim: int | None = None) -> Tensor:
        """Mean over the vocabulary (dim -1), NaN where nothing was scored; or over everything that was scored.

        trl up to 0.28 also counts a row's last position where a response without its prompt is cut from the left.
        """
        if dim not in (None, -1):
            raise ValueError(f"patch_trl(): mean of logits that are never built: expected dim -1 or none, got {dim}")
        unscored = self.values["labels"] == IGNORE_INDEX
        mean = self._value("mean_logits", "mean").masked_fill(unscored, torch.nan)
        return mean.nanmean() if dim is None else mean

    def argmax(self, dim: int) -> Tensor:
        """The label where it is the most likely token, else -1: all that a comparison with the label needs."""
        if dim != -1:
            raise ValueError(f"patch_trl(): argmax of logits that are never built: expected dim -1, got {dim}")
        return torch.where(self._value("is_top1", "argmax"), self.values["labels"], -1)

    def log_softmax_at(self, index: Tensor) -> Tensor:
        """Log-probs of the labels, 0 where nothing is scored; NaN where another token than the label is asked for."""
        labels, log_probs = self.values["labels"], self._value("log_probs", "log_softmax")
        return torch.where((labels == IGNORE_INDEX) | (labels == index), log_probs, torch.nan)

    def entropy(self) -> Tensor:
        """Entropy of the next-token distribution, nats, 0 where nothing is scored."""
        return self._value("entropy", "entropy")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Dispatch the functions of torch that trl calls on logits."""
        name = getattr(function, "__name__", str(function))
        if name not in _FUNCTIONS:
            raise ValueError(
                f"patch_trl(): {name} was asked of logits that are never built: unpatch_trl() for this use of trl"
            )
        return _FUNCTIONS[name](*args, **(kwargs or {}))


def _flatten(logits: ScoredLogits, start_dim: int = 0, end_dim: int = 1) -> ScoredLogits:
    return logits._each(lambda value: value.flatten(start_dim, end_dim))


def _log_softmax(logits: ScoredLogits, dim: int = -1, **_: Any) -> ScoredLogits:
    """The argument: ScoredLogits are logits up to a constant a row."""
    return logits


def _logsumexp(logits: ScoredLogits, dim: int = -1) -> Tensor:
    """Of log-probs: log Σ p = 0, and where they are multiplied by 2, log Σ p²."""
    if logits.scale == 1.0:
        return torch.zeros_like(logits.values["log_probs"])
    if logits.scale != 2.0:
        raise ValueError(f"patch_trl(): logsumexp of logits that are never built, times {logits.scale}")
    return ScoredLogits(logits.values, logits.vocab)._value("log_sum_sq_probs", "logsumexp")


def _cross_entropy(
    logits: ScoredLogits, labels: Tensor, *_: Any, ignore_index: int = IGNORE_INDEX, reduction: str = "mean", **__: Any
) -> Tensor:
    """Mean negative log-prob of the labels that are not ignored."""
    if reduction != "mean":
        raise ValueError(f"patch_trl(): cross_entropy of logits that are never built: reduction {reduction!r}")
    counted = labels != ignore_index
    return -logits.log_softmax_at(labels).masked_fill(~counted, 0.0).sum() / counted.sum()


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "flatten": _flatten,
    "log_softmax": _log_softmax,
    "logsumexp": _logsumexp,
    "cross_entropy": _cross_entropy,
}


def scored_output(
    grids: dict[str, Tensor], labels: Tensor, aux_loss: Tensor | None, vocab: int, keep: int | None
) -> ScoredOutput:
    """The output for (rows, width - 1) grids and labels (rows, width), nats.

    keep is trl's logits_to_keep: only that many last positions; None or 0 means all.
    """
    values = {name: F.pad(grid, (0, 1)) for name, grid in grids.items()}
    values["labels"] = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).to(values["log_probs"].device)
    logits = ScoredLogits(values, vocab)
    return ScoredOutput(logits=logits[:, -keep:] if keep else logits, log_probs=values["log_probs"], aux_loss=aux_loss)
