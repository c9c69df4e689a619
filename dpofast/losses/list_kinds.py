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
    rankings = [tuple(rank for rank in row if rank >= 0) for row in x.ranks.tolist()]
    choices = [(row, choice) for row, ranking in enumerate(rankings) for choice in _choices(ranking)]
    width = rewards.shape[1]
    owner = torch.tensor([row for row, _ in choices], device=rewards.device)
    taken, left = (
        torch.tensor([[i in members for i in range(width)] for members in sets], device=rewards.device)
        for sets in ([choice[0] for _, choice in choices], [choice[1] for _, choice in choices])
    )
    weight = torch.tensor([choice[2] for _, choice in choices], device=rewards.device, dtype=rewards.dtype)
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
