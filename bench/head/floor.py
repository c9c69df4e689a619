"""The bare matrix products of a mode, whose time is a lower bound for every contender."""

import torch

from bench.head.problem import MODES, Problem

FLOOR = "floor"


class Floor:
    """Runs the products of a mode, each by torch.mm into an allocated and touched buffer."""

    def __init__(self, problem: Problem) -> None:
        """Allocate and touch the (N, V) and the two result buffers."""
        self.hidden, self.weight = problem.hidden, problem.weight
        self.e = torch.zeros(len(self.hidden), len(self.weight), dtype=self.hidden.dtype, device=self.hidden.device)
        self.dh, self.dw = torch.zeros_like(self.hidden), torch.zeros_like(self.weight)

    def __call__(self, mode: str) -> None:
        """One product for the log-probs, one more for each gradient."""
        torch.mm(self.hidden, self.weight.t(), out=self.e)
        if "hidden" in MODES[mode]:
            torch.mm(self.e, self.weight, out=self.dh)
        if "weight" in MODES[mode]:
            torch.mm(self.e.t(), self.hidden, out=self.dw)
