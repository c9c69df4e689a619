"""The largest reward at a given divergence from π_ref, and that of best-of-N, estimated from samples of π_ref alone.

Under E[r] − β·KL(π‖π_ref) the optimum is π*(y|x) = π_ref(y|x)·exp(r(x, y)/β)/Z(x) (DPO, equation 4), so that

    E_π*[r] ≈ Σ_k w_k r_k,   w_k = exp(r_k/β) / Σ_j exp(r_j/β)                     self-normalised importance sampling
    KL(π*‖π_ref) = E_π*[r]/β − log Z,   Z ≈ mean_k exp(r_k/β)
    effective samples = 1 / Σ_k w_k²

over K samples of each prefix. The estimate of KL cannot exceed log K, and both estimates are unreliable if a few
samples have most of the weight, which the number of effective samples shows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A tenth of the prefixes may have fewer effective samples before a point of the frontier is left out. A self-normalised
# estimate is off by about one over their number, relative to the spread of the reward: then by a tenth of it.
LEAST_EFFECTIVE_SAMPLES = 10.0


@dataclass(frozen=True)
class FrontierPoint:
    """The optimum at one β, means over prefixes.

    Attributes:
        beta: strength of the KL penalty.
        reward: E_π*[r].
        kl: KL(π*‖π_ref), nats.
        effective_samples: their 10th percentile over the prefixes.
    """

    beta: float
    reward: float
    kl: float
    effective_samples: float

    @property
    def reliable(self) -> bool:
        """Whether enough samples carry the weight."""
        return self.effective_samples >= LEAST_EFFECTIVE_SAMPLES


def importance_weights(rewards: Tensor, beta: float) -> Tensor:
    """exp(r/β), normalised over the last dimension."""
    return (rewards.double() / beta).softmax(-1)


def optimum(rewards: Tensor, beta: float) -> FrontierPoint:
    """π* of one β.

    Args:
        rewards: (prefixes, K) of K samples of π_ref for each prefix.
        beta: more than 0.
    """
    weights = importance_weights(rewards, beta)
    expected = (weights * rewards).sum(-1)
    log_z = (rewards.double() / beta).logsumexp(-1) - math.log(rewards.shape[-1])
    effective = 1 / weights.square().sum(-1)
    return FrontierPoint(
        beta=beta,
        reward=float(expected.mean()),
        # The empirical divergence is Σ w log(K·w): never negative, which rounding may make it.
        kl=max(0.0, float((expected / beta - log_z).mean())),
        effective_samples=float(effective.quantile(0.1)),
    )


def frontier(rewards: Tensor, betas: Sequence[float]) -> list[FrontierPoint]:
    """optimum() of every β, from the largest (least divergence) on."""
    return [optimum(rewards, beta) for beta in sorted(betas, reverse=True)]


def reward_at(rewards: Tensor, kl: float) -> FrontierPoint:
    """The optimum whose divergence is `kl` nats, by bisection over β; if even β = 0.01 does not reach it, that one."""
    low, high = math.log(0.01), math.log(1e4)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if optimum(rewards, math.exp(middle)).kl < kl else (middle, high)
    return optimum(rewards, math.exp(low))


def best_of_n(rewards: Tensor, n: int, chosen_by: Tensor | None = None) -> float:
    """The mean over prefixes of E[the reward of the best of N], without bias: over all choices of N among the K.

    Args:
        rewards: (prefixes, K) of K samples of π_ref for each prefix.
        n: samples to choose among.
        chosen_by: (prefixes, K) scores, the highest of which is the best; None: the rewards themselves.

    Raises:
        ValueError: n is not in [1, K].
    """
    count = rewards.shape[-1]
    if not 1 <= n <= count:
        raise ValueError(f"n: expected 1 to {count}, the samples of a prefix, got {n}")
    # The i-th smallest of K (from 1) is the largest of a choice of N with probability C(i−1, N−1)/C(K, N).
    weights = [math.comb(i, n - 1) / math.comb(count, n) for i in range(count)]
    order = (rewards if chosen_by is None else chosen_by).argsort(-1)
    ordered = rewards.double().gather(-1, order)
    return float((ordered * torch.tensor(weights, dtype=torch.float64)).sum(-1).mean())


def best_of_n_kl_bound(n: int) -> float:
    """log N − (N − 1)/N nats: at least the divergence of best-of-N (Beirami et al., arXiv 2401.01879)."""
    return math.log(n) - (n - 1) / n


def hull_reward(points: Sequence[tuple[float, float]], kl: float) -> float:
    """The largest reward at a divergence of at most `kl` on the upper concave hull of (divergence, reward) points.

    A mixture of two policies has the mixed reward and, as KL is convex, at most the mixed divergence: what lies on the
    hull can be reached. One of the points must lie at or below `kl` (π_ref at 0).

    Raises:
        ValueError: none does.
    """
    within = [reward for x, reward in points if x <= kl]
    if not within:
        raise ValueError(f"points: expected one with a divergence of at most {kl}, got {sorted(points)[:3]}")
    crossings = [
        low + (high - low) * (kl - x) / (z - x) for x, low in points if x <= kl for z, high in points if z > kl
    ]
    return max([*within, *crossings])
