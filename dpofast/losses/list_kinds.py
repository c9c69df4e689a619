"""The loss kinds of lists: one small function each, (Lists, LossOptions) -> (P,) losses in nats, in KINDS (kinds.py).

Symbols (nats): s_i = β·(policy − reference log-prob of response i), ls = log σ. A pair is a list of two. All kinds are
separable: a list's loss depends on that list alone.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations, groupby
from math import comb
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dpofast.losses.options import LossOptions
from dpofast.losses.pairs import Lists

# Sets of tied responses double with every one of them.
MOST_TIED = 8
# 2 to the power of a score stops here, where float32 still holds it, as the exponents of divergences.py do.
_MOST_GAIN = 80.0


def plackett_luce(x: Lists, loss: LossOptions) -> Tensor:
    """DPO on rankings (Plackett-Luce), arXiv 2305.18290 eq. 20: Σ_k [log Σ_{j≥k} e^{s_τ(j)} − s_τ(k)], τ best first.

    Of tied responses the mean over all orders that the ties allow.
    """
    rewards = x.rewards
    rankings = [tuple(row) for row in x.ranks.tolist()]
    # Without ties all rankings of one length are alike, so the choices of equal rankings are listed once.
    number_of = {ranking: number for number, ranking in enumerate(dict.fromkeys(rankings))}
    choices = [_choices(tuple(rank for rank in ranking if rank >= 0)) for ranking in number_of]
    width = rewards.shape[1]

    def joined(name: str) -> Tensor:
        """`name` of all choices: (C, K), or (C,) shares."""
        parts = [getattr(each, name) for each in choices]
        parts = [F.pad(part, (0, width - part.shape[1])) if part.dim() == 2 else part for part in parts]
        return _beside(torch.cat(parts), rewards)

    number = torch.tensor([number_of[ranking] for ranking in rankings])
    counts = torch.tensor([len(each.share) for each in choices])
    rows = torch.arange(len(rankings)).repeat_interleave(counts[number])
    # Of each row, its choices among all: the first one's number and those that follow.
    place = torch.arange(len(rows)) - (counts[number].cumsum(0) - counts[number])[rows]
    choice = _beside((counts.cumsum(0) - counts)[number[rows]] + place, rewards)
    owner = _beside(rows, rewards)
    taken, left, share = joined("taken")[choice], joined("left")[choice], joined("share").to(rewards.dtype)[choice]
    mine, alone = rewards[owner], taken.sum(1) == 1
    mean = torch.where(taken, mine, 0.0).sum(1, keepdim=True) / taken.sum(1, keepdim=True)
    # log Σ e^(s − mean) over what is left. Of one response, whose addend is 1, log(1 + Σ of the others), which keeps
    # the digits of a sum near 0.
    summed = left & ~(taken & alone[:, None])
    terms = torch.where(summed, mine - mean, -torch.inf).logsumexp(1)
    terms = share * torch.where(alone, -F.logsigmoid(-terms), terms)
    # In float64, so that the order in which a device adds does not change the float32 result.
    sums = rewards.new_zeros(len(rewards), dtype=torch.float64).index_add(0, owner, terms.double())
    return sums.to(rewards.dtype)


class _Choices(NamedTuple):
    """The C choices that make up a ranking of K responses: from `left` one of `taken` is chosen, all alike, so often.

    Attributes:
        taken: (C, K) bool, the tied responses not chosen yet, which stand before all others that are left.
        left: (C, K) bool.
        share: (C,) float64, the part of the orders that the ties allow in which these are left.
    """

    taken: Tensor
    left: Tensor
    share: Tensor


@lru_cache(4096)
def _choices(ranking: tuple[int, ...]) -> _Choices:
    """Those of non-decreasing ranks; the last choice, of one response alone, is left out.

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
        after = range(tied[-1] + 1, len(ranking))
        for count in range(1, len(tied) + 1):
            for taken in combinations(tied, count):
                if count + len(after) > 1:
                    choices.append((taken, (*taken, *after), 1 / comb(len(tied), count)))

    def members(sets: list[tuple[int, ...]]) -> Tensor:
        chosen = torch.zeros(len(sets), len(ranking), dtype=torch.bool)
        for row, each in enumerate(sets):
            chosen[row, list(each)] = True
        return chosen

    shares = torch.tensor([share for _, _, share in choices], dtype=torch.float64)
    return _Choices(members([taken for taken, _, _ in choices]), members([left for _, left, _ in choices]), shares)


def softmax_dpo(x: Lists, loss: LossOptions) -> Tensor:
    """S-DPO, arXiv 2406.09215: −ls(−log Σ_j e^(s_j − s_w)), the best response w against all worse ones j.

    Of several that tie for the best the mean. A list of one rank has no worse ones, and a loss of 0.
    """
    rewards = x.rewards
    best, worse = _beside(x.ranks == 0, rewards), _beside(x.ranks > 0, rewards)
    # Not −inf, of which a list of one rank would make a NaN in the gradient.
    against = torch.where(worse, rewards, torch.finfo(rewards.dtype).min).logsumexp(1, keepdim=True)
    return torch.where(best, -F.logsigmoid(rewards - against), 0.0).sum(1) / best.sum(1)


def infonca(x: Lists, loss: LossOptions) -> Tensor:
    """InfoNCA, arXiv 2402.05369: −Σ_i t_i·log softmax(s)_i with t = softmax(score/α), α = score_temperature.

    Of pairs t = (1, 0), which makes it DPO.
    """
    rewards, count = x.rewards, x.rewards.shape[1]
    others = x.member[:, None, :] & ~torch.eye(count, dtype=torch.bool, device=rewards.device)
    # log softmax as log σ of the distance to all others, which keeps the digits of a probability near 1
    against = torch.where(others, rewards[:, None, :], -torch.inf).logsumexp(2)
    return -(_targets(x, loss) * F.logsigmoid(rewards - against)).sum(1)


def nca(x: Lists, loss: LossOptions) -> Tensor:
    """NCA of K responses, arXiv 2402.05369: −Σ_i [t_i·ls(s_i) + ls(−s_i)/K] with t = softmax(score/α).

    α = score_temperature. Of pairs t = (1, 0), which makes it nca_pair.
    """
    rewards, member = x.rewards, x.member.to(x.policy.dtype)
    share = member / member.sum(1, keepdim=True)
    return -(_targets(x, loss) * F.logsigmoid(rewards) + share * F.logsigmoid(-rewards)).sum(1)


def lipo_lambda(x: Lists, loss: LossOptions) -> Tensor:
    """LiPO-λ, arXiv 2402.01878: Σ_{ψ_i>ψ_j} −Δ_ij·ls(s_i − s_j), Δ_ij = (2^ψ_i − 2^ψ_j)·abs(1/D(τ_i) − 1/D(τ_j)).

    ψ = score/score_temperature, of pairs (1, 0); D(τ) = log(1 + τ) of the place τ that a response has by s now, from 1,
    without gradient. Responses of equal ψ make no pair.
    """
    rewards = x.rewards
    if x.scores is None:
        labels = _beside(x.ranks == 0, rewards).to(rewards.dtype)
    else:
        labels = (x.scores / loss.score_temperature).clamp(max=_MOST_GAIN)
    order = torch.where(x.member, rewards.detach(), -torch.inf).argsort(dim=1, descending=True, stable=True)
    discount = 1 / (order.argsort(dim=1) + 2).to(rewards.dtype).log()
    gain = labels.exp2()

    def differences(values: Tensor) -> Tensor:
        return values[:, :, None] - values[:, None, :]

    ordered = (differences(labels) > 0) & x.member[:, :, None] & x.member[:, None, :]
    terms = -differences(gain) * differences(discount).abs() * F.logsigmoid(differences(rewards))
    return torch.where(ordered, terms, 0.0).sum((1, 2))


def _targets(x: Lists, loss: LossOptions) -> Tensor:
    """t (P, K), which adds up to 1: the softmax of the scores, or without them the best, tied ones alike."""
    if x.scores is None:
        best = _beside(x.ranks == 0, x.policy).to(x.policy.dtype)
        return best / best.sum(1, keepdim=True)
    return torch.where(x.member, x.scores / loss.score_temperature, -torch.inf).softmax(1)


def _beside(values: Tensor, like: Tensor) -> Tensor:
    """Values from the CPU on the device of `like`, without waiting for it."""
    return values.to(like.device, non_blocking=True)
