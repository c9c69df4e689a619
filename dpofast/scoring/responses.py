"""ResponseLogps: token log-probs of the responses of preference pairs, the record that a forward-only pass returns.

The reference cache stores it as it is: sums over a response, plain or weighted as in LD-DPO, follow without a model.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dpofast.losses.functional import chosen_and_rejected
from dpofast.losses.sequences import pair_logprobs, segment_sums


@dataclass(frozen=True, eq=False)
class ResponseLogps:
    """Log-probs of every token of the S responses of P pairs; equal responses of a micro-batch are stored once.

    Attributes:
        logps: (N,) float32 on the CPU, nats.
        cu_targets: (S + 1,) int32; response s owns logps[cu_targets[s]:cu_targets[s + 1]].
        pairs: (P, 2) int32, chosen and rejected response of every row.
    """

    logps: Tensor
    cu_targets: Tensor
    pairs: Tensor

    def sums(self, ld_alpha: float | None = None) -> Tensor:
        """(P, 2) float32, nats: sums over chosen and rejected response; ld_alpha weights tokens as LD-DPO does."""
        if ld_alpha is None:
            return chosen_and_rejected(segment_sums(self.logps, self.cu_targets), self.pairs)
        return pair_logprobs(self.logps, self.cu_targets, self.pairs, ld_alpha=ld_alpha)

    def lengths(self) -> Tensor:
        """(P, 2) int32: tokens of chosen and rejected response."""
        return self.cu_targets.diff()[self.pairs.long()]
