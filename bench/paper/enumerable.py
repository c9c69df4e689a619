"""A toy task with few enough responses to enumerate, so that reference, rewards and optimal policy are exact.

The reference of a prompt is autoregressive, with a row of logits for each context: a position and the symbol before it.
The reward sums a term for each symbol and one for each pair of neighbours, so the optimal policy
π*(y|x) ∝ π_ref(y|x)·exp(r*(x,y)/β) has the same contexts, and a table of logits can represent it exactly.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

import dpofast


@dataclass(frozen=True)
class Space:
    """Responses of `length` symbols out of `symbols`, for `prompts` prompts.

    Contexts of a prompt: one for the first symbol, and `symbols` for each later position.
    """

    prompts: int
    symbols: int
    length: int

    @property
    def responses(self) -> int:
        """Of one prompt."""
        return self.symbols**self.length

    @property
    def contexts(self) -> int:
        """Of one prompt."""
        return 1 + self.symbols * (self.length - 1)

    @property
    def free_parameters(self) -> int:
        """Of one prompt: a context's probabilities add up to 1."""
        return self.contexts * (self.symbols - 1)

    def all_responses(self) -> Tensor:
        """(responses, length) int64, in lexicographic order."""
        return torch.tensor(list(itertools.product(range(self.symbols), repeat=self.length)))

    @cached_property
    def steps(self) -> Tensor:
        """(responses, length) int64: context·symbols + symbol of every token, of one prompt."""
        responses = self.all_responses()
        context = torch.zeros_like(responses)
        context[:, 1:] = 1 + torch.arange(self.length - 1) * self.symbols + responses[:, :-1]
        return context * self.symbols + responses


@dataclass(frozen=True)
class World:
    """ref_head: (symbols, prompts·contexts), the reference's logits; rewards: (prompts, responses), r*. float64."""

    space: Space
    ref_head: Tensor
    rewards: Tensor

    def optimum(self, beta: float) -> Tensor:
        """log π*, (prompts, responses), nats: normalized by counting."""
        return (sequence_logps(self.ref_head, self.space) + self.rewards / beta).log_softmax(1)


def random_world(space: Space, *, seed: int) -> World:
    """A reference that is not uniform, and rewards of standard deviation 1 under it, both drawn from a seed."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    ref_head = 0.7 * normal(space.symbols, space.prompts * space.contexts)
    single, double = normal(space.prompts, space.symbols), normal(space.prompts, space.symbols, space.symbols)
    responses = space.all_responses()
    rewards = single[:, responses].sum(2) + double[:, responses[:, :-1], responses[:, 1:]].sum(2)
    probs = sequence_logps(ref_head, space).exp()
    centred = rewards - (probs * rewards).sum(1, keepdim=True)
    return World(space, ref_head, centred / (probs * centred.square()).sum(1, keepdim=True).sqrt())


def token_logps(head: Tensor, space: Space) -> Tensor:
    """log-probs of every symbol in every context, (prompts·contexts·symbols,), nats, by dpofast.linear_logprobs.

    A context is a one-hot hidden state, so a row of logits is a column of head (symbols, prompts·contexts).
    """
    contexts = space.prompts * space.contexts
    hidden = torch.eye(contexts, dtype=head.dtype).repeat_interleave(space.symbols, 0)
    return dpofast.linear_logprobs(hidden, head, torch.arange(space.symbols).repeat(contexts)).logps


def sequence_logps(head: Tensor, space: Space) -> Tensor:
    """log-probs of all responses, (prompts, responses), nats, differentiable in head."""
    return token_logps(head, space).view(space.prompts, -1)[:, space.steps].sum(2)


def kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p‖q) of distributions in rows, (prompts,), nats, summed over all responses."""
    return (logp.exp() * (logp - logq)).sum(1)


def sample_rankings(world: World, rankings: int, responses: int, *, seed: int) -> Tensor:
    """(prompts·rankings, responses) int64, best first, numbered through prompt·responses of the space + response.

    The responses are drawn from the reference and ranked by Plackett-Luce: each place goes to one of those that are
    left with probability softmax(r*). Rankings of two are the pairs of sample_pairs from the same seed.
    """
    return _ranked(world, rankings, responses, torch.Generator().manual_seed(seed)).flatten(0, 1)


def sample_pairs(world: World, pairs: int, *, seed: int, flipped: float = 0.0) -> Tensor:
    """(prompts·pairs, 2) int64, chosen and rejected, numbered through prompt·responses + response.

    Both responses are drawn from the reference, the better one by Bradley-Terry, P(y ≻ y') = σ(r*(y) − r*(y')), and
    then a share `flipped` of the labels is turned round.
    """
    draw = torch.Generator().manual_seed(seed)
    ranked = _ranked(world, pairs, 2, draw)
    turned = torch.rand(ranked.shape[:2], generator=draw, dtype=torch.float64) < flipped
    return torch.where(turned[..., None], ranked.flip(2), ranked).flatten(0, 1)


def _ranked(world: World, rankings: int, responses: int, draw: torch.Generator) -> Tensor:
    """(prompts, rankings, responses) int64, as sample_rankings."""
    shape = (world.space.prompts, rankings)
    # the inverse of the distribution function: multinomial would be slower by far
    bounds = sequence_logps(world.ref_head, world.space).exp().cumsum(1)
    uniform = torch.rand(*shape, responses, generator=draw, dtype=torch.float64).flatten(1)
    drawn = torch.searchsorted(bounds, uniform * bounds[:, -1:]).view(*shape, responses)
    rewards = world.rewards.gather(1, drawn.flatten(1)).view(*shape, responses)
    ranked = []
    for _ in range(responses - 1):
        bounds = rewards.softmax(2).cumsum(2)[..., :-1]
        uniform = torch.rand(*shape, 1, generator=draw, dtype=torch.float64)
        taken = (uniform >= bounds).sum(2, keepdim=True)
        ranked.append(drawn.gather(2, taken))
        kept = torch.ones_like(drawn, dtype=torch.bool).scatter_(2, taken, False)
        drawn, rewards = (values[kept].view(*shape, -1) for values in (drawn, rewards))
    first = torch.arange(shape[0]) * world.space.responses
    return torch.cat([*ranked, drawn], dim=2) + first[:, None, None]
