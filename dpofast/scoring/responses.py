"""ResponseLogps: token log-probs of the responses of preference pairs, or lists: what a forward-only pass returns.

The reference cache stores it as it is: sums over a response, plain, weighted token by token or as in LD-DPO, follow
without a model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpofast.losses.sequences import of_lists, pair_logprobs, segment_sums


def check_ld_alpha(ld_alpha: float | None, *, is_list: bool, weighted: bool) -> None:
    """Raise ValueError where ld_alpha, which weights the tokens of a pair, meets lists or tokens that have weights."""
    if ld_alpha is None:
        return
    if is_list:
        raise ValueError(
            "ld_alpha: weights the tokens of a pair by the shorter response, and these rows are lists: leave it out"
        )
    if weighted:
        raise ValueError(
            "ld_alpha: weights tokens itself, and these rows have weights of tokens (chosen_weights, rejected_weights, "
            "or made of turns that do not all count): leave out one of the two"
        )


@dataclass(frozen=True, eq=False)
class ResponseLogps:
    """Log-probs of every token of the S responses of P pairs or lists; equal ones of a micro-batch are stored once.

    Attributes:
        logps: (N,) float32 on the CPU, nats.
        cu_targets: (S + 1,) int32; response s owns logps[cu_targets[s]:cu_targets[s + 1]].
        rows: (P, K) int32, the responses of every row: chosen and rejected, or those of a list, best first, filled
            with −1.
    """

    logps: Tensor
    cu_targets: Tensor
    rows: Tensor

    @property
    def member(self) -> Tensor:
        """(P, K) bool: False where a list has fewer responses."""
        return self.rows >= 0

    def sums(self, ld_alpha: float | None = None, weights: Tensor | None = None) -> Tensor:
        """(P, K) float32, nats: sums over every row's responses, 0 where a list has fewer.

        Args:
            ld_alpha: weights the tokens of pairs as LD-DPO does.
            weights: (sum of lengths,) of the tokens of every row's responses, row by row; sums are of
                weight · log-prob. A weight of 1 changes no bit.

        Raises:
            ValueError: ld_alpha with weights, or with rows of more than two responses.
        """
        check_ld_alpha(ld_alpha, is_list=self.rows.shape[1] != 2, weighted=weights is not None)
        if ld_alpha is not None:
            return pair_logprobs(self.logps, self.cu_targets, self.rows, ld_alpha=ld_alpha)
        if weights is None:
            return of_lists(segment_sums(self.logps, self.cu_targets), self.rows)
        # A response that several rows have in common may have other weights in each: every row gets a copy.
        responses = self.rows[self.member].long()
        lengths = self.cu_targets.diff().long()[responses]
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        shift = self.cu_targets[:-1].long()[responses] - bounds[:-1]
        copied = self.logps[torch.arange(len(weights)) + shift.repeat_interleave(lengths)]
        sums = torch.zeros(self.rows.shape)
        sums[self.member] = segment_sums(copied, bounds.int(), weights)
        return sums

    def lengths(self) -> Tensor:
        """(P, K) int32: tokens of every row's responses, 0 where a list has fewer."""
        return torch.where(self.member, self.cu_targets.diff()[self.rows.clamp(min=0).long()], 0)
