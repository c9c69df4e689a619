"""Pairs and lists with columns, and their losses in float64 from the equations, token by token."""

from itertools import permutations

import torch
from torch.nn.functional import logsigmoid

from dpofast.losses.columns import PreferenceColumns
from tests.support.losses_cases import LENGTHS, problem

# Four lists: a tie, sequences in two of them, and the seventh sequence in none.
LISTS = [[1, 0, 2, 3], [2, 0, -1, -1], [5, 4, 1, -1], [7, 5, -1, -1]]
RANKS = [[0, 1, 1, 2], [0, 1, -1, -1], [0, 0, 1, -1], [0, 1, -1, -1]]
BEST_AND_WORST = [[1, 3], [2, 0], [5, 1], [7, 5]]


def token_weights(lengths=LENGTHS):
    """(N,) float32: masked, halved and plain tokens; the third sequence, of one token, is masked altogether."""
    generator = torch.Generator().manual_seed(5)
    weights = torch.tensor([0.0, 0.5, 1.0, 2.25])[torch.randint(0, 4, (sum(lengths),), generator=generator)]
    weights[sum(lengths[:2])] = 0.0
    return weights


def pair_columns(pairs=5):
    """Every column of pairs, as PreferenceColumns of the LENGTHS."""
    generator = torch.Generator().manual_seed(6)
    drawn = torch.rand(4, pairs, generator=generator)
    return PreferenceColumns(
        weight=drawn[0] * 3,
        margin=drawn[1] * 2 - 1,
        beta=drawn[2] * 0.5 + 0.05,
        label_smoothing=drawn[3] / 2,
        token_weights=token_weights(),
    )


def list_columns(**columns):
    """LISTS and RANKS, and other columns."""
    lists, ranks = (torch.tensor(values, dtype=torch.int32) for values in (LISTS, RANKS))
    return PreferenceColumns(lists=lists, ranks=ranks, **columns)


def list_problem(dtype=torch.float64):
    """problem() with the best and the worst of each list as its pairs."""
    tokens, cu_targets, _, ref_tokens, log_sum_sq = problem(dtype)
    return tokens, cu_targets, torch.tensor(BEST_AND_WORST, dtype=torch.int32), ref_tokens, log_sum_sq


def weighted_sums(tokens, cu_targets, weights):
    """(S,) sums of weight · value over the tokens that have a weight above 0, one by one."""
    bounds, sums = cu_targets.tolist(), []
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        total = tokens.new_zeros(())
        for token in range(start, stop):
            weight = 1.0 if weights is None else float(weights[token])
            if weight:
                total = total + weight * tokens[token]
        sums.append(total)
    return torch.stack(sums)


def weighted_lengths(cu_targets, weights):
    """(S,) float64, the sum of each sequence's weights, 1 in place of 0."""
    ones = torch.ones(int(cu_targets[-1]), dtype=torch.float64)
    lengths = weighted_sums(ones, cu_targets, weights)
    return torch.where(lengths > 0, lengths, 1.0)


def pair_losses(kind, sums, ref, lengths, pairs, columns, beta, smoothing):
    """(P,) float64 losses of sigmoid, sigmoid_norm, hinge or sft, with the columns of the pairs, by the equations."""
    losses = []
    for p, (chosen, rejected) in enumerate(pairs.tolist()):
        weight, margin, own_beta, epsilon = (
            otherwise if column is None else float(column[p])
            for column, otherwise in (
                (columns.weight, 1.0),
                (columns.margin, 0.0),
                (columns.beta, beta),
                (columns.label_smoothing, smoothing),
            )
        )
        w, l = sums[chosen] - ref[chosen], sums[rejected] - ref[rejected]  # noqa: E741
        if kind == "sigmoid_norm":
            w, l = w / lengths[chosen], l / lengths[rejected]  # noqa: E741
        u = own_beta * (w - l) - margin
        loss = {
            "hinge": lambda u=u: torch.clamp(1 - u, min=0),
            "sft": lambda chosen=chosen: -sums[chosen] * len(pairs) / lengths[pairs[:, 0].long()].sum(),
        }.get(kind, lambda u=u, e=epsilon: -(1 - e) * logsigmoid(u) - e * logsigmoid(-u))()
        losses.append(weight * loss)
    return torch.stack(losses)


def plackett_luce_losses(sums, ref, columns, beta):
    """(P,) float64: minus the log-probability of each ranking, its mean over all orders that the ties allow."""
    losses = []
    for p, (members, ranks) in enumerate(zip(columns.lists.tolist(), columns.ranks.tolist(), strict=True)):
        members = [s for s in members if s >= 0]
        own_beta = beta if columns.beta is None else float(columns.beta[p])
        rewards = [own_beta * (sums[s] - ref[s]) for s in members]
        orders = [
            order
            for order in permutations(range(len(members)))
            if all(ranks[a] <= ranks[b] for a, b in zip(order[:-1], order[1:], strict=True))
        ]
        of_orders = [
            sum(
                torch.stack([rewards[i] for i in order[k:]]).logsumexp(0) - rewards[order[k]] for k in range(len(order))
            )
            for order in orders
        ]
        weight = 1.0 if columns.weight is None else float(columns.weight[p])
        losses.append(weight * sum(of_orders) / len(orders))
    return torch.stack(losses)
