"""Powers of two that keep a float16 head's products inside float16, so that its GEMMs use tensor cores.

E of a row has entries up to S, which reaches V, and c ⊙ h has |c| = |g|/S: on flat rows of V = 262,144 and g = 1e-3, a
loss over 64 pairs, the one passes float16's largest number and the other its least. So a row of E is stored as 2ᵏ·E
with 2ᵏ·S in [2¹², 2¹³) (kernels/token_logprobs.py; RowSums.rescale takes 2ᵏ back), and c ⊙ h as a·c ⊙ h with one power
of two a for a block of rows. dW is accumulated in float32, in units of 1/a, and divided by a where it is rounded. a
follows from g, which only the device knows: it stays there, and no step waits for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpofast.head.engine.rows import scale_tensor

# The largest |a·c·h| of a block lies in [2¹¹, 2¹²): far from float16's largest number, 65,504, and 2³⁵ times its least.
_EXPONENT = 12
# a stays a normal float32, and so does 1/a.
_LARGEST_EXPONENT = 100


class ProductScale:
    """The power of two a of c ⊙ h, which only falls from block to block: what was accumulated before follows it.

    Attributes:
        factor: a, a float32 scalar on the device; None before the first block.
    """

    def __init__(self, *, triton: bool) -> None:
        """No block yet. triton: by the kernels of kernels/scale.py, else in torch."""
        self.triton = triton
        self.factor: Tensor | None = None

    def follow(self, total: Tensor | None, hidden: Tensor, coefficients: Tensor) -> Tensor:
        """a·c of the next block, (R,) float32, for its c (R,) and hidden (R, D).

        total: dW (V, D) of the blocks before, in float32, rescaled in place where a falls; None before the first.
        """
        largest = torch.linalg.vector_norm(hidden, torch.inf, dim=1).float() * coefficients.abs()
        # where, not times zero: an ignored row's hidden may be NaN
        most = torch.where(coefficients == 0, 0.0, largest).amax()
        exponent = (_EXPONENT - torch.frexp(most).exponent).clamp_(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
        factor = torch.ldexp(torch.ones_like(most), exponent)
        if self.factor is not None and total is not None:
            factor = torch.minimum(factor, self.factor)
            scale_tensor(total, factor / self.factor, triton=self.triton)
        self.factor = factor
        return coefficients * factor

    def rounded(self, total: Tensor, dtype: torch.dtype) -> Tensor:
        """dW in `dtype` from its sum in units of 1/a."""
        assert self.factor is not None
        return torch.mul(total, 1.0 / self.factor, out=torch.empty_like(total, dtype=dtype))
