"""Minimize DPO's loss on a finite sample in an enumerable world, and compare the optimum with the closed form."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import dpofast
from bench.paper.enumerable import World, kl, sample_pairs, sequence_logps
from bench.paper.information import whitening
from dpofast.losses.columns import NO_COLUMNS, PreferenceColumns

# Convergence threshold on the largest gradient entry, in coordinates in which the loss's curvature is about one.
SLOPE = 1e-7
# L-BFGS runs _ITERATIONS iterations, then restarts in coordinates whitened at the current point; _ROUNDS runs at most.
_ITERATIONS, _ROUNDS = 30, 10


@dataclass(frozen=True)
class Fit:
    """What the optimum is; step: what was added to the reference's logits; calls: of the loss; slope: left over."""

    step: Tensor
    loss: float
    calls: int
    slope: float


def fit(world: World, sample: Tensor, loss: dpofast.PreferenceLoss) -> Fit:
    """Minimize dpofast.preference_loss over all pairs or rankings at once by L-BFGS, from the reference.

    The loss of DPO is convex in the policy's log-ratios, and these contexts can have any log-ratio whose terms are of
    neighbouring symbols; so there is one optimum, and where the search begins does not matter.

    sample: (n, K) int64, the responses of each, best first; K = 2 for a loss of pairs.
    """
    space = world.space
    columns = NO_COLUMNS
    if loss.of_lists:
        places = torch.arange(sample.shape[1], dtype=torch.int32)
        columns = PreferenceColumns(lists=sample.int(), ranks=places.expand(sample.shape))
    pairs = sample[:, [0, -1]]
    with torch.no_grad():
        ref_logps = sequence_logps(world.ref_head, space).flatten()
    moved, calls = torch.zeros_like(world.ref_head), 0
    for _ in range(_ROUNDS):
        with torch.no_grad():
            units = whitening(world, sequence_logps(world.ref_head + moved, space))
        found = torch.zeros(space.prompts, units.shape[1], dtype=torch.float64, requires_grad=True)

        def head(moved: Tensor = moved, found: Tensor = found, units: Tensor = units) -> Tensor:
            step = torch.einsum("pi,pij->pj", found, units).view(space.prompts * space.contexts, space.symbols)
            return moved + step.T / loss.beta

        def closure(head: Callable[[], Tensor] = head, found: Tensor = found) -> Tensor:
            nonlocal calls
            calls += 1
            found.grad = None
            logps = sequence_logps(world.ref_head + head(), space).flatten()
            value = dpofast.preference_loss(logps, pairs, ref_logps, loss=loss, columns=columns).loss
            value.backward()
            return value

        search = torch.optim.LBFGS(
            [found], max_iter=_ITERATIONS, tolerance_grad=SLOPE, tolerance_change=0, line_search_fn="strong_wolfe"
        )
        search.step(closure)
        value, slope = closure().item(), found.grad.abs().max().item()
        moved = head().detach()
        if slope <= SLOPE:
            break
    return Fit(moved, value, calls, slope)


# True margins, in the middle of bins of this width, whose implicit margins are averaged.
MARGINS, _WIDTH = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0), 0.2
# Of each prompt, responses whose rewards are kept to be shown.
_SHOWN = 100


def implicit_rewards(world: World, step: Tensor, beta: float) -> Tensor:
    """β·log(π/π_ref), (prompts, responses), its mean under π_ref taken off for each prompt."""
    ref = sequence_logps(world.ref_head, world.space)
    rewards = beta * (sequence_logps(world.ref_head + step, world.space) - ref)
    return rewards - (ref.exp() * rewards).sum(1, keepdim=True)


def figures(world: World, sample: Tensor, loss: dpofast.PreferenceLoss) -> dict[str, Any]:
    """The optimum on a sample against π*, all by counting: means over prompts, under π_ref where it says weighted.

    kl: KL(π_θ‖π*), nats; kl_reverse: KL(π*‖π_θ); kl_reference: KL(π*‖π_ref); correlation, regression: Pearson's r of
    the implicit reward with r*, and its slope on r*, weighted; accuracy: of neighbours in a ranking under r*;
    binned_margins: the mean implicit margin of pairs whose true margin is about one of MARGINS; rewards: true and
    implicit reward of some responses.
    """
    result = fit(world, sample, loss)
    optimum, ref = world.optimum(loss.beta), sequence_logps(world.ref_head, world.space)
    policy = sequence_logps(world.ref_head + result.step, world.space)
    rewards, weight = implicit_rewards(world, result.step, loss.beta), ref.exp()
    shared = (weight * rewards * world.rewards).sum()
    own, true = (weight * rewards.square()).sum(), (weight * world.rewards.square()).sum()
    margins = world.rewards.flatten()[sample].diff(dim=1)
    fresh = sample_pairs(world, 100_000, seed=10**6 + 1)
    true_margins, implicit = (values.flatten()[fresh].diff(dim=1).squeeze(1) for values in (world.rewards, rewards))
    bins = [implicit[(true_margins - middle).abs() < _WIDTH / 2].mean().item() for middle in MARGINS]
    shown = fresh[:: len(fresh) // (_SHOWN * world.space.prompts), 0]
    return {
        "kl": kl(policy, optimum).mean().item(),
        "kl_reverse": kl(optimum, policy).mean().item(),
        "kl_reference": kl(optimum, ref).mean().item(),
        "correlation": (shared / (own * true).sqrt()).item(),
        "regression": (shared / true).item(),
        "accuracy": (margins < 0).double().mean().item(),
        "loss": result.loss,
        "binned_margins": bins,
        "rewards": torch.stack([world.rewards.flatten()[shown], rewards.flatten()[shown]], dim=1).tolist(),
        "calls": result.calls,
        "slope_left": result.slope,
    }
