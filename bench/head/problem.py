"""The problem that every contender solves: hidden states, LM head and targets in; log-probs, loss, gradients out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.cases import SEED

BETA = 0.1
MODES = {"trained": ("hidden", "weight"), "frozen": ("hidden",), "forward": ()}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One call of the head: hidden (N, D), weight (V, D), targets (N,) int64, of as many pairs as `pairs` says.

    Chosen and rejected sequences alternate, and all have one length, so that a padded peer pads nothing.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    pairs: int

    @staticmethod
    def make(n: int, d: int, v: int, pairs: int, dtype: torch.dtype, device: torch.device) -> "Problem":
        """Random tensors whose logits have a standard deviation of 2."""
        random: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(SEED), "device": device}
        hidden = torch.randn(n, d, **random).to(dtype)
        weight = torch.randn(v, d, **random).mul_(2 / d**0.5).to(dtype)
        targets = torch.randint(0, v, (n,), **random)
        return Problem(hidden=hidden, weight=weight, targets=targets, pairs=pairs)

    def loss(self, logps: Tensor) -> Tensor:
        """DPO's loss of per-token log-probs (N,)."""
        chosen, rejected = logps.view(self.pairs, 2, -1).sum(2).unbind(1)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()


# hidden, weight -> log-probs, (N,) of tokens or (S,) of sequences, and the loss
Head = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def run(head: Head, problem: Problem, mode: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One forward, and the backward that the mode asks for. Returns log-probs and gradients."""
    names = MODES[mode]
    hidden = problem.hidden.detach().requires_grad_("hidden" in names)
    weight = problem.weight.detach().requires_grad_("weight" in names)
    with torch.set_grad_enabled(bool(names)):
        logps, loss = head(hidden, weight)
    leaves = [leaf for leaf in (hidden, weight) if leaf.requires_grad]
    return logps.detach(), torch.autograd.grad(loss, leaves) if leaves else ()


def per_token(problem: Problem, logps: Callable[[Tensor, Tensor], Tensor]) -> Head:
    """A contender that returns per-token log-probs; the DPO loss is computed from them by Problem.loss."""

    def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        values = logps(hidden, weight)
        return values, problem.loss(values)

    return head


def plain_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probs (N,) by the plain code: all logits in float32, log-softmax, gather."""
    logits = (hidden @ weight.t()).float()
    return logits.log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
