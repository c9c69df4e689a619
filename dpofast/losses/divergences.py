"""f-divergences (f-DPO, arXiv 2309.16240): the score s(u) of a log-ratio u = log(policy/reference), nats, elementwise.

DPO's own u belongs to the reverse Kullback-Leibler divergence. Exponents stop at 80, where float32 still holds e^80.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

_MAX_EXPONENT = 80.0


def _reverse_kl(u: Tensor, alpha: float) -> Tensor:
    """Return u."""
    return u


def _forward_kl(u: Tensor, alpha: float) -> Tensor:
    """1 − e^(−u): the alpha divergence at 0."""
    return _alpha_divergence(u, 0.0)


def _js_divergence(u: Tensor, alpha: float) -> Tensor:
    """Log 2 + log σ(u)."""
    return math.log(2) + F.logsigmoid(u)


def _alpha_divergence(u: Tensor, alpha: float) -> Tensor:
    """(e^((α−1)u) − 1)/(α − 1), whose limit at α = 1 is u."""
    if abs(alpha - 1) < 1e-6:
        return u
    return torch.expm1(((alpha - 1) * u).clamp(max=_MAX_EXPONENT)) / (alpha - 1)


DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "js_divergence": _js_divergence,
    "alpha_divergence": _alpha_divergence,
}
