"""Fisher information of preference pairs and rankings about a policy of an enumerable world, and the KL it predicts."""

import torch
from torch import Tensor

from bench.paper.enumerable import Space, World, sample_rankings, sequence_logps

_PART = 10_000  # rankings whose gradients are held at once


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


def predicted_kl(world: World, beta: float, *, responses: int = 2, draws: int = 100_000) -> float:
    """n times the mean KL(π_θ‖π*) to be expected of the optimum on n rankings a prompt, for large n: tr(F·H⁻¹)/2.

    Maximum likelihood's covariance is H⁻¹/n, with H a ranking's information; and KL is half the squared distance in F,
    the information of π* itself. A ranking is a choice for each place out of the responses that are left, of which y is
    taken with probability p(y), the softmax of r*; with g the gradient of log π*(y), a choice tells β²·Cov_p[g], and
    H is the mean of the choices' sum. Of a pair it is β²·σ(Δ)σ(−Δ)·gᵀg, Δ its true margin, g the difference of the
    two. Rankings are drawn for H; F is a sum over all responses.
    """
    space, total = world.space, 0.0
    rankings = sample_rankings(world, draws, responses, seed=10**6).view(space.prompts, -1, responses)
    for prompt, logps in enumerate(world.optimum(beta)):
        score = scores(logps, space)
        information = torch.zeros(score.shape[1], score.shape[1], dtype=score.dtype)
        for part in (rankings[prompt] - prompt * space.responses).split(_PART):
            for place in range(responses - 1):
                left = part[:, place:]
                probs = world.rewards[prompt][left].softmax(1)[..., None]
                g = score[left]
                g = ((g - (probs * g).sum(1, keepdim=True)) * probs.sqrt()).flatten(0, 1)
                information += g.T @ g
        inverse = torch.linalg.pinv(information * (beta**2 / draws), rtol=1e-10, hermitian=True)
        total += 0.5 * (fisher(logps, score) * inverse).sum().item()
    return total / space.prompts
