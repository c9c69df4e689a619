"""The float32 result that every contender is compared with, and the tolerances of that comparison."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.head.peers import naive
from bench.head.problem import Problem, run

LOGPS_TOLERANCE = 1e-3
# Of a gradient's norm; a 16-bit gradient is allowed its dtype's epsilon where that is more.
GRAD_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Truth:
    """Log-probs (N,), dh (N, D) and dW (V, D) of the plain code in float32.

    own: log-probs from the product of the 16-bit tensors with a float32 result, where the device has it (CUDA). Tensor
    cores may truncate partial sums to float32 every few terms; an error of that size is allowed to every contender.
    """

    logps: Tensor
    grads: tuple[Tensor, ...]
    own: Tensor | None = None

    @staticmethod
    def of(problem: Problem) -> "Truth":
        """Upcast what is 16-bit and run the plain code."""
        wide = Problem(
            hidden=problem.hidden.float(),
            weight=problem.weight.float(),
            targets=problem.targets,
            pairs=problem.pairs,
        )
        own = None
        if problem.hidden.is_cuda and problem.hidden.dtype != torch.float32:
            logits = torch.mm(problem.hidden, problem.weight.t(), out_dtype=torch.float32)
            own = logits.log_softmax(-1).gather(1, problem.targets.unsqueeze(1)).squeeze(1)
            del logits
        return Truth(*run(naive(wide), wide, "trained"), own)

    def difference(self, logps: Tensor) -> float:
        """The largest difference of log-probs, (N,) of tokens or (S,) of sequences, from the truth, in nats."""
        expected = self.logps.double()
        if len(logps) < len(expected):
            expected = expected.view(len(logps), -1).sum(1)
        return float((logps.double() - expected).abs().max())

    def limit(self, count: int) -> float:
        """The largest difference that `count` log-probs may have: twice that of `own` beyond LOGPS_TOLERANCE."""
        if self.own is None:
            return LOGPS_TOLERANCE
        return LOGPS_TOLERANCE + 2 * self.difference(self.own.double().view(count, -1).sum(1))

    def errors(self, logps: Tensor, grads: tuple[Tensor, ...]) -> dict[str, float | None]:
        """Largest difference of logps; the norm of each gradient's difference over its norm; None: no finite number."""
        found = {"logps": self.difference(logps)}
        for name, grad, true in zip(("dh", "dW"), grads, self.grads, strict=False):
            found[name] = float((grad.float() - true).norm() / true.norm())
        return {name: error if math.isfinite(error) else None for name, error in found.items()}


def gate(errors: dict[str, float | None], dtype: torch.dtype, logps_limit: float = LOGPS_TOLERANCE) -> str:
    """The errors above their limits, in words; empty if there are none."""
    limits = dict.fromkeys(("dh", "dW"), max(GRAD_TOLERANCE, torch.finfo(dtype).eps)) | {"logps": logps_limit}
    wrong = []
    for name, error in errors.items():
        if error is None:
            wrong.append(f"{name} not finite")
        elif error > limits[name]:
            wrong.append(f"{name} off by {error:.1e}")
    return ", ".join(wrong)
