"""The loss kinds of lists: one small function each, (Lists, LossOptions) -> (P,) losses in nats, in KINDS (kinds.py).

Symbols (nats): s_i = β·(policy − reference log-prob of response i), ls = log σ. A pair is a list of two. All kinds are
separable: a list's loss depends on that list alone.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations, groupby
from math import comb

import torch
from torch import Tensor

from dpofast.losses.options import LossOptions
from dpofast.losses.pairs import Lists

# Sets of tied responses double with every one of them.
MOST_TIED = 8


def plackett_luce(x: Lists, loss: LossOptions) -> Tensor:
    """DPO on rankings (Plackett-Luce), arXiv 2305.18290 eq. 20: Σ_k [log Σ_{j≥k} e^{s_τ(j)} − s_τ(k)], τ best first.

    Of tied responses the mean over all orders that the ties allow.
    """
    rewards = x.rewards
    # Most rankings of a batch are alike (without ties all of one length are), so their choices are listed once.
    rankings, ranking_of = x.ranks.unique(dim=0, return_inverse=True)
    choices = [_choices(tuple(rank for rank in row if rank >= 0)) for row in rankings.tolist()]
    counts = torch.tensor([len(of_ranking) for of_ranking in choices])
    of_row = counts[ranking_of]
    rows = torch.arange(len(of_row)).repeat_interleave(of_row)
    place = torch.arange(len(rows)) - (of_row.cumsum(0) - of_row)[rows]
    number = ((counts.cumsum(0) - counts)[ranking_of[rows]] + place).to(rewards.device, non_blocking=True)
    owner, width = rows.to(rewards.device, non_blocking=True), rewards.shape[1]
    listed = [choice for of_ranking in choices for choice in of_ranking]
    taken, left = (
        torch.tensor([[i in members for i in range(width)] for members in sets], device=rewards.device)[number]
        for sets in ([choice[0] for choice in listed], [choice[1] for choice in listed])
    )
    weight = torch.tensor([choice[2] for choice in listed], device=rewards.device, dtype=rewards.dtype)[number]
    mine = rewards[owner]
    mean = torch.where(taken, mine, 0.0).sum(1, keepdim=True) / taken.sum(1, keepdim=True)
    terms = weight * torch.where(left, mine - mean, -torch.inf).logsumexp(1)
    return rewards.new_zeros(len(rewards)).index_add(0, owner, terms)


@cache
def _choices(ranking: tuple[int, ...]) -> list[tuple[frozenset[int], frozenset[int], float]]:
    """The choices that make up a ranking: from `left` one of `taken` is chosen, all alike, so often.

    Args:
        ranking: ranks, non-decreasing.

    Returns:
        (taken, left, share): taken, the tied responses not chosen yet, stand before all others in left; share is the
        part of the orders that the ties allow in which these are left. The last choice, of one, is left out.

    Raises:
        ValueError: more than MOST_TIED tied responses.
    """
    choices = []
    for _, group in groupby(range(len(ranking)), key=lambda i: ranking[i]):
        tied = list(group)
        if len(tied) > MOST_TIED:
            raise ValueError(
                f"ranks: plackett_luce takes up to {MOST_TIED} tied responses, got {len(tied)}: rank them, or leave "
                "some out"
            )
        after = frozenset(range(tied[-1] + 1, len(ranking)))
        for count in range(1, len(tied) + 1):
            for taken in combinations(tied, count):
                left = after.union(taken)
                if len(left) > 1:
                    choices.append((frozenset(taken), left, 1 / comb(len(tied), count)))
    return choices
