"""Fisher information of preference pairs about a policy of an enumerable world, and the KL it predicts."""

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.paper.enumerable import Space, World, sample_pairs, sequence_logps

_PART = 20_000  # pairs whose gradients are held at once


def scores(logps: Tensor, space: Space) -> Tensor:
    """Gradients of log π(y) with respect to π's logits, (responses, contexts·symbols), of one prompt.

    logps: (responses,), π's own, nats. The gradient is 1 at each token of y, less π(symbol | context) for every symbol
    of the contexts that y goes through.
    """
    probs = logps.exp()
    taken = torch.zeros(space.responses, space.contexts * space.symbols, dtype=logps.dtype).scatter_(1, space.steps, 1)
    visits = taken.view(space.responses, space.contexts, space.symbols).sum(2).repeat_interleave(space.symbols, 1)
    return taken - visits * ((probs @ taken) / (probs @ visits))


def fisher(logps: Tensor, score: Tensor) -> Tensor:
    """E_π[score·scoreᵀ], (contexts·symbols, contexts·symbols)."""
    return score.T @ (logps.exp()[:, None] * score)


def whitening(world: World, policy: Tensor) -> Tensor:
    """C^(−1/2), (prompts, contexts·symbols, contexts·symbols), C the covariance under π_ref of the policy's scores.

    policy: its log-probs, (prompts, responses). In these units the loss is about equally curved in every direction:
    that makes the search for the optimum short, and leaves alone where the optimum is.
    """
    found = []
    for logps, ref in zip(policy, sequence_logps(world.ref_head, world.space), strict=True):
        score, weight = scores(logps, world.space), ref.exp()
        values, vectors = torch.linalg.eigh(fisher(ref, score - weight @ score))
        # directions that add one number to all logits of a context change nothing: their eigenvalue is 0
        scale = torch.where(values > 1e-12 * values.max(), values.clamp(min=1e-300).rsqrt(), 0.0)
        found.append(vectors * scale @ vectors.T)
    return torch.stack(found)


def predicted_kl(world: World, beta: float, *, draws: int = 100_000) -> float:
    """n times the mean KL(π_θ‖π*) to be expected of the optimum on n pairs a prompt, for large n: tr(F·H⁻¹)/2.

    Maximum likelihood's covariance is H⁻¹/n, with H = E[β²·σ(Δ)σ(−Δ)·gᵀg] a pair's information, Δ its true margin, g
    the gradient of log π*(y) − log π*(y'); and KL is half the squared distance in F, the information of π* itself.
    Pairs are drawn for H; F is a sum over all responses.
    """
    space, total = world.space, 0.0
    pairs = sample_pairs(world, draws, seed=10**6).view(space.prompts, -1, 2)
    for prompt, logps in enumerate(world.optimum(beta)):
        score = scores(logps, space)
        local = pairs[prompt] - prompt * space.responses
        margins = world.rewards[prompt][local].diff(dim=1).squeeze(1)
        weights = beta**2 * (F.logsigmoid(margins) + F.logsigmoid(-margins)).exp() / draws
        information = torch.zeros(score.shape[1], score.shape[1], dtype=score.dtype)
        for part, weight in zip(local.split(_PART), weights.split(_PART), strict=True):
            g = score[part[:, 0]] - score[part[:, 1]]
            information += g.T @ (weight[:, None] * g)
        inverse = torch.linalg.pinv(information, rtol=1e-10, hermitian=True)
        total += 0.5 * (fisher(logps, score) * inverse).sum().item()
    return total / space.prompts
