"""How logits are transformed and which statistics are asked for (LogitOptions), and what a call returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dpofast.common.constants import IGNORE_INDEX

STATS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


@dataclass(frozen=True)
class LogitOptions:
    """How raw logits become z, and which targets do not count. Validated when built."""

    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    ignore_index: int = IGNORE_INDEX
    stats: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise ValueError for an option that cannot mean anything."""
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature: expected a positive finite number, got {self.temperature}")
        if not abs(self.logit_scale) < float("inf"):
            raise ValueError(f"logit_scale: expected a finite number, got {self.logit_scale}")
        if self.softcap is not None and not 0 < self.softcap < float("inf"):
            raise ValueError(f"softcap: expected None or a positive finite number, got {self.softcap}")
        if self.ignore_index >= 0:
            raise ValueError(f"ignore_index: expected a negative number, which no token id is, got {self.ignore_index}")
        unknown = [name for name in self.stats if name not in STATS]
        if unknown:
            raise ValueError(f"stats: expected names among {STATS}, got {unknown}")

    def kernel_arguments(self) -> dict[str, Any]:
        """What both kernels of kernels/token_logprobs.py take."""
        names = ("temperature", "logit_scale", "softcap", "ignore_index")
        return {name: getattr(self, name) for name in names}

    @property
    def gradient_scale(self) -> float:
        """dz/dx without softcap's factor."""
        return self.logit_scale / self.temperature


@dataclass(frozen=True)
class LogprobOutput:
    """Log-probs of N targets and, where asked for, per-token statistics without gradient.

    logps (N,) float32, nats, differentiable, 0 where the target was ignored. entropy (nats), mean_logits, is_top1
    (bool) and log_sum_sq_probs (log Σ p², nats) are (N,), or None where `stats` did not name them. aux_loss is a
    model's own auxiliary loss (mixture-of-experts balancing), or None.
    """

    logps: Tensor
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    aux_loss: Tensor | None = None
