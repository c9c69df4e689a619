"""How well rewards order the responses of a list: pair accuracy, Kendall's tau, NDCG, and accuracy of the best.

For rewards r and true ranks of one list, where (i, j) is strictly ordered if i has the better rank:

    accuracy      share of the strictly ordered pairs with r_i > r_j; equal rewards count as not accurate
    ties          share of them with r_i = r_j
    kendall_tau   (pairs with r_i > r_j − pairs with r_i < r_j) / strictly ordered pairs. Pairs of tied ranks are left
                  out, so that 1 is reached by every list whose ranks the rewards follow: Kendall's tau where no ranks
                  are tied, Somers' D of the rewards given the ranks where some are
    ndcg          Σ gain/log2(1 + place) by descending reward, divided by the same in the true order (Järvelin and
                  Kekäläinen 2002, doi 10.1145/582415.582418; gains of Burges et al. 2005): gain 2^rel − 1, where rel is
                  0 for the worst rank of the list and grows by 1 a rank. Scores may be any numbers, so they are not
                  used. Of equal rewards the mean over their orders (McSherry and Najork 2008)
    best_of_k     1 if the largest reward is that of a response of the best rank, and of no other, else 0

They say nothing of a list whose responses are all tied; it is left out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ListMetrics(NamedTuple):
    """Of P lists, (P,) float64 each, NaN where all responses are tied; `ordered` is (P,) bool, on the CPU."""

    accuracy: Tensor
    ties: Tensor
    kendall_tau: Tensor
    ndcg: Tensor
    best_of_k: Tensor
    ordered: Tensor

    def values(self) -> dict[str, Tensor]:
        """The metrics by name."""
        return {name: value for name, value in self._asdict().items() if name != "ordered"}


# Of ListMetrics, what an evaluation logs beside the metrics that pairs have too.
LIST_METRICS = ("kendall_tau", "ndcg", "best_of_k")


def list_metrics(rewards: Tensor, ranks: Tensor) -> ListMetrics:
    """Compute ListMetrics on the device of the rewards, without a sync.

    Args:
        rewards: (P, K).
        ranks: (P, K) integer on the CPU, dense from 0 (the best) and ascending; −1 where a list has fewer responses.
    """
    ordered = ranks.amax(1) > 0
    ranks = ranks.to(rewards.device, non_blocking=True)
    rewards, member = rewards.double(), ranks >= 0
    both = member[:, :, None] & member[:, None, :]
    better = both & (ranks[:, :, None] < ranks[:, None, :])  # [p, i, j]: i has the better rank
    above = both & (rewards[:, :, None] > rewards[:, None, :])  # ... the larger reward
    equal = both & (rewards[:, :, None] == rewards[:, None, :])
    pairs = better.sum((1, 2)).double()
    right, tied = ((better & part).sum((1, 2)) / pairs for part in (above, equal))
    wrong = (better & above.transpose(1, 2)).sum((1, 2)) / pairs
    best = torch.where(member & (ranks == 0), rewards, -torch.inf).amax(1)
    others = torch.where(member & (ranks > 0), rewards, -torch.inf).amax(1)
    right, tied, tau, ndcg, best_of_k = (
        torch.where(pairs > 0, value, torch.nan)
        for value in (right, tied, right - wrong, _ndcg(ranks, above, equal), (best > others).double())
    )
    return ListMetrics(right, tied, tau, ndcg, best_of_k, ordered)


def _ndcg(ranks: Tensor, above: Tensor, equal: Tensor) -> Tensor:
    """NDCG of ranks (P, K); above and equal (P, K, K) compare the rewards of responses i and j."""
    places = torch.arange(ranks.shape[1] + 1, device=ranks.device, dtype=torch.float64)
    discounts = torch.where(places > 0, 1 / (1 + places).log2(), 0.0).cumsum(0)  # over the first so many places
    # 2^rel − 1 divided by 2^(the best rel), which cancels, and would overflow for long lists
    worst = ranks.amax(1, keepdim=True).double()
    gains = torch.where(ranks >= 0, (-ranks.double()).exp2() - (-worst).exp2(), 0.0)
    # A response stands behind all of larger reward, anywhere among those of its own.
    before, alike = above.sum(1), equal.sum(1)
    discount = (discounts[before + alike] - discounts[before]) / alike.clamp(min=1)
    return (gains * discount).sum(1) / (gains * discounts.diff()).sum(1)
