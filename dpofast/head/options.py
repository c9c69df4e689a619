"""LogitOptions: logit transform and requested statistics of an LM-head call; LogprobOutput: its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dpofast.common.constants import IGNORE_INDEX

STATS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


@dataclass(frozen=True)
class LogitOptions:
    """Options that map raw logits x to z, the target to ignore and the requested statistics.

    z = softcap · tanh(logit_scale · x / softcap) / temperature, without softcap z = logit_scale · x / temperature.
    stats holds names from STATS. Validated at construction.

    Raises:
        ValueError: an option is out of range, or stats holds an unknown name.
    """

    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    ignore_index: int = IGNORE_INDEX
    stats: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise ValueError for an option out of range."""
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
        """The options that both kernels of kernels/token_logprobs.py take, as keyword arguments."""
        names = ("temperature", "logit_scale", "softcap", "ignore_index")
        return {name: getattr(self, name) for name in names}

    @property
    def gradient_scale(self) -> float:
        """dz/dx without softcap's factor 1 − tanh²: logit_scale / temperature."""
        return self.logit_scale / self.temperature


@dataclass(frozen=True)
class LogprobOutput:
    """Log-probs of N targets and the requested per-token statistics, which carry no gradient.

    Attributes:
        logps: (N,) float32, nats, differentiable; 0 where the target was ignored.
        entropy: (N,) of softmax(z), nats; None unless requested, like the following three.
        mean_logits: (N,) mean of z over the vocabulary.
        is_top1: (N,) bool, whether the target is the argmax.
        log_sum_sq_probs: (N,) log Σ p², nats.
        aux_loss: the model's auxiliary loss (mixture-of-experts load balancing), or None.
    """

    logps: Tensor
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    aux_loss: Tensor | None = None
