"""Count what a trainer computes: positions through the backbone, rows through the LM head, GEMM operations.

Also time the same GEMMs alone, which is the least time that a step could take.
"""

import math
import timeit
from typing import Any

import torch
from torch import nn

from bench.cost import Cost


class Work:
    """Counts what runs inside `with Work(model) as work:`, forward and backward, of the model and of a reference.

    Attributes:
        positions: tokens that a model's embedding looked up, pads included.
    """

    def __init__(self, model: Any) -> None:
        """Count for models of this one's hidden size and vocabulary."""
        self.vocab, self.hidden = model.get_input_embeddings().weight.shape
        head = model.get_output_embeddings()
        layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
        # Two sides of a layer's product are its weight's; of the head's, over the vocabulary or a tile, only one is.
        self._widths = {width for layer in layers for width in layer.weight.shape}
        self.positions = 0
        self._cost = Cost()

    def __enter__(self) -> "Work":
        """Begin; every nn.Embedding of the vocabulary's size counts, so that a copied reference does too."""

        def look_up(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if isinstance(module, nn.Embedding) and module.num_embeddings == self.vocab:
                self.positions += inputs[0].numel()

        self._hook = nn.modules.module.register_module_forward_pre_hook(look_up)
        self._cost.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop counting."""
        self._cost.__exit__(*error)
        self._hook.remove()

    def figures(self, steps: int) -> dict[str, float]:
        """Means of a step: positions, rows times products through the head, GEMM work in units of 1e9, its seconds."""
        head = sum(math.prod(shape) * count for shape, count in self._cost.gemms.items() if self._is_head(shape))
        return {
            "positions": self.positions / steps,
            "head_rows": head / (self.hidden * self.vocab) / steps,
            "gemm_gflops": self._cost.gemm_flops / 1e9 / steps,
            "gemm_s": sum(seconds_alone(*shape) * count for shape, count in self._cost.gemms.items()) / steps,
        }

    def _is_head(self, shape: tuple[int, int, int]) -> bool:
        return self.hidden in shape and sum(side in self._widths for side in shape) < 2


def seconds_alone(m: int, k: int, n: int) -> float:
    """The best of three times of torch.mm, (M, K)·(N, K)ᵀ, into memory that it has written before."""
    left, right, product = torch.randn(m, k), torch.randn(n, k), torch.empty(m, n)
    return min(timeit.repeat(lambda: torch.mm(left, right.t(), out=product), number=1, repeat=3))
