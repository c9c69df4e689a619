"""Token log-probs -> sequence log-probs: segment sums, lengths, and the weighted sums of LD-DPO."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """Log-probs of the N targets of S sequences.

    logps (N,) float, nats; cu_targets (S+1,) int32 on the CPU; counted (N,) bool, False where a target was ignored, or
    None if none was; log_sum_sq (N,), log Σp², or None; weights (N,) of 0 or more, each target's factor in all sums of
    its sequence, also in the one that is its length, or None for 1.
    """

    logps: Tensor
    cu_targets: Tensor
    counted: Tensor | None = None
    log_sum_sq: Tensor | None = None
    weights: Tensor | None = None

    def sums(self) -> Tensor:
        """(S,) sums of weight · log-prob over each sequence, nats, differentiable in logps."""
        return segment_sums(self.logps, self.cu_targets, self.weights)

    def is_token(self) -> Tensor:
        """(N,) bool: counted, or True for every target where it is None."""
        return torch.ones_like(self.logps, dtype=torch.bool) if self.counted is None else self.counted

    def lengths(self) -> Tensor:
        """(S,) in the dtype of logps: the weights of each sequence's counted targets, summed; 1 where that is 0.

        Without weights: how many counted targets each sequence has, at least 1.
        """
        if self.weights is not None:
            weights = self.weights if self.counted is None else torch.where(self.counted, self.weights, 0.0)
            return at_least_one_token(segment_sums(weights.to(self.logps.dtype), self.cu_targets))
        if self.counted is None:
            counts = self.cu_targets.diff().to(self.logps.device, self.logps.dtype, non_blocking=True)
        else:
            counts = segment_sums(self.counted.to(self.logps.dtype), self.cu_targets)
        return counts.clamp(min=1)

    def positions(self) -> Tensor:
        """(N,) int32: how many counted targets of the same sequence come before each target."""
        counted = self.is_token().int()
        before = counted.cumsum(0, dtype=torch.int32) - counted
        # Padded, since an empty last sequence starts at N.
        starts = self.cu_targets[:-1].long().to(before.device, non_blocking=True)
        padded = torch.nn.functional.pad(before, (0, 1))
        return before - spread(padded[starts], self.cu_targets, len(before))


def segment_sums(token_logps: Tensor, cu_targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sums of token_logps (N,) over the sequences of cu_targets (S+1,) int32 on the CPU: (S,), differentiable.

    Accumulated in float64, so that the order in which a device adds does not change the float32 result. With weights
    (N,) sums of weight · log-prob: a weight of 1 changes no bit, and where it is 0 the sum and its gradient are
    exactly 0, also of a log-prob of −inf.
    """
    sums = token_logps.new_zeros(len(cu_targets) - 1, dtype=torch.float64)
    owner = spread(torch.arange(len(sums), device=token_logps.device), cu_targets, len(token_logps))
    terms = token_logps.double()
    if weights is not None:
        terms = torch.where(weights == 0, 0.0, terms * weights.double())
    return sums.index_add(0, owner, terms).to(token_logps.dtype)


def at_least_one_token(lengths: Tensor) -> Tensor:
    """Lengths by which log-probs may be divided: 1 in place of 0, which an empty or a masked sequence has."""
    return lengths.masked_fill(lengths == 0, 1)


def spread(values: Tensor, cu_targets: Tensor, num_targets: int) -> Tensor:
    """values (S,) repeated for every target of its sequence: (N,), without a device sync."""
    lengths = cu_targets.diff().to(values.device, non_blocking=True)
    return values.repeat_interleave(lengths, output_size=num_targets)


def side_indices(pairs: Tensor, device: torch.device) -> Tensor:
    """pairs (P, 2) as an index: int64 on the device."""
    return pairs.to(device=device, dtype=torch.int64, non_blocking=True)


def of_lists(values: Tensor, lists: Tensor) -> Tensor:
    """(P, K): values (S,) of every list's sequences, 0 where a list has fewer; lists (P, K) are filled with -1."""
    member = (lists >= 0).to(values.device, non_blocking=True)
    return torch.where(member, values[side_indices(lists.clamp(min=0), values.device)], 0.0)


def chosen_and_rejected(values: Tensor, pairs: Tensor) -> Tensor:
    """(P, 2): values (S,) of every pair's chosen and rejected sequence; values that are (P, 2) already as they are."""
    return values if values.dim() == 2 else values[side_indices(pairs, values.device)]


def pair_logprobs(
    token_logps: Tensor, cu_targets: Tensor, pairs: Tensor, *, ld_alpha: float, counted: Tensor | None = None
) -> Tensor:
    """Sequence log-probs (P, 2) of chosen and rejected response as LD-DPO weights them (arXiv 2409.06411).

    Tokens up to the length of the pair's shorter response count once, further ones ld_alpha times. token_logps (N,),
    nats, differentiable; cu_targets (S+1,) and pairs (P, 2) int32 on the CPU; counted (N,) as in token_preference_loss.
    """
    tokens = Tokens(token_logps, cu_targets, counted)
    # A response shared by several pairs has another weight in each: every pair gets a copy of its tokens' numbers.
    sequence = pairs.reshape(-1).long()
    sizes = cu_targets.diff().long()[sequence]
    side = torch.arange(len(sequence)).repeat_interleave(sizes)
    token = torch.arange(len(side)) + (cu_targets[:-1].long()[sequence] - (sizes.cumsum(0) - sizes))[side]
    side, token = (index.to(token_logps.device, non_blocking=True) for index in (side, token))
    shared = tokens.lengths()[side_indices(pairs, token_logps.device)].amin(1).repeat_interleave(2)
    weight = torch.where(tokens.positions()[token] < shared[side], 1.0, ld_alpha).double()
    sums = token_logps.new_zeros(len(sequence), dtype=torch.float64)
    return sums.index_add(0, side, weight * token_logps[token].double()).to(token_logps.dtype).view(-1, 2)
