"""Lists of responses, and pairs with columns, for the tiny models, and plain padded loops over them."""

import itertools
import random
from typing import NamedTuple

import torch
from datasets import Dataset

from dpofast import reference
from tests.support.tiny import VOCAB, tiny_model, tiny_pairs


def tiny_lists(count=10, seed=0, *, most=5, scores=True, ties=True, weights=False):
    """Lists of 2 to `most` token-level responses as a user gives them: in any order, with ranks and scores.

    Prompts repeat, responses begin alike, and a response is tied with another where `ties` is True.
    """
    draw = random.Random(seed)

    def ids(fewest, longest):
        return [draw.randrange(5, VOCAB) for _ in range(draw.randint(fewest, longest))]

    prompts, rows = [ids(2, 9) for _ in range(count // 2 + 1)], []
    for _ in range(count):
        size, common = draw.randint(2, most), ids(0, 2)
        responses = [[*common, 97 - 1 - place, *ids(0, 5)] for place in range(size)]
        numbers = [float(number) for number in draw.sample(range(20), size)]
        if ties and size > 2:
            numbers[1] = numbers[0]
        row = {"prompt_ids": draw.choice(prompts), "responses_ids": responses}
        if scores:
            row["scores"] = numbers
        else:
            row["ranks"] = [sorted(set(numbers), reverse=True).index(number) + 1 for number in numbers]
        if weights:
            row["responses_weights"] = [[draw.choice((0.25, 0.5, 1.0, 2.0)) for _ in each] for each in responses]
        rows.append(row)
    return rows


def tiny_list_dataset(count=10, seed=0, **options):
    """tiny_lists as a Dataset."""
    return Dataset.from_list(tiny_lists(count, seed, **options))


def tiny_columns(count=12, seed=0, *names):
    """tiny_pairs with some of the columns weight, margin, beta, label_smoothing, and token_weights, as a Dataset."""
    draw, rows = random.Random(seed), tiny_pairs(count, seed)
    ranges = {"weight": (0.0, 2.0), "margin": (-0.5, 0.5), "beta": (0.05, 0.5), "label_smoothing": (0.0, 0.4)}
    for row in rows:
        row |= {name: draw.uniform(*ranges[name]) for name in names if name in ranges}
        if "token_weights" in names:
            for side in ("chosen", "rejected"):
                weights = [draw.choice((0.0, 0.5, 1.0, 2.0)) for _ in row[f"{side}_ids"]]
                row[f"{side}_weights"] = [*weights[:-1], 1.5]
    return Dataset.from_list(rows)


class PlainRow(NamedTuple):
    """A pair or a list for plain loops: responses best first, their ranks and weights of tokens, numbers of the row."""

    prompt: list
    responses: list
    ranks: list
    weights: list
    numbers: dict


def plain_rows(dataset):
    """PlainRows of tiny_lists or tiny_columns."""
    rows = []
    for row in dataset:
        if "responses_ids" in row:
            order = sorted(range(len(row["scores"])), key=lambda place: -row["scores"][place])
            levels = sorted(set(row["scores"]), reverse=True)
            responses, ranks = row["responses_ids"], [levels.index(row["scores"][place]) for place in order]
            weights = row.get("responses_weights")
        else:
            responses, order, ranks = [row["chosen_ids"], row["rejected_ids"]], [0, 1], [0, 1]
            weights = [row["chosen_weights"], row["rejected_weights"]] if "chosen_weights" in row else None
        responses = [responses[place] for place in order]
        ones = [[1.0] * len(ids) for ids in responses]
        weights = ones if weights is None else [weights[place] for place in order]
        rows.append(PlainRow(row["prompt_ids"], responses, ranks, weights, row))
    return rows


def plain_logps(model, row):
    """(K,) weighted sums of the log-probs of a PlainRow's responses, over padded rows."""
    padded = reference.padded_rows([(row.prompt, response) for response in row.responses])
    logps = reference.padded_logprobs(model, **padded).split([len(response) for response in row.responses])
    return torch.stack([own @ torch.tensor(weights) for own, weights in zip(logps, row.weights, strict=True)])


def plackett_luce(ratios, row, beta):
    """The mean over every order that the ties allow of −Σ_k log softmax of the k-th among those that are left."""
    orders = [
        order
        for order in itertools.permutations(range(len(row.ranks)))
        if [row.ranks[place] for place in order] == sorted(row.ranks)
    ]
    losses = [
        -sum(torch.log_softmax(beta * ratios[list(order[first:])], 0)[0] for first in range(len(order)))
        for order in orders
    ]
    return torch.stack(losses).mean()


def weighted_sigmoid(ratios, row, beta):
    """v·(−(1−ε)·log σ(x) − ε·log σ(−x)) with x = β·Δ − m, and v, ε, β, m those of the row."""
    x = row.numbers.get("beta", beta) * (ratios[0] - ratios[1]) - row.numbers.get("margin", 0.0)
    flipped, sigmoid = row.numbers.get("label_smoothing", 0.0), torch.nn.functional.logsigmoid
    return row.numbers.get("weight", 1.0) * (-(1 - flipped) * sigmoid(x) - flipped * sigmoid(-x))


def plain_training(dataset, batch_size, loss_of, *, beta=0.1, lr=0.1):
    """Train by SGD over padded rows in the given order. Returns losses and final weights."""
    policy, ref = tiny_model(), tiny_model()
    optimizer, losses, rows = torch.optim.SGD(policy.parameters(), lr=lr), [], plain_rows(dataset)
    for start in range(0, len(rows), batch_size):
        step = []
        for row in rows[start : start + batch_size]:
            with torch.no_grad():
                ref_logps = plain_logps(ref, row)
            step.append(loss_of(plain_logps(policy, row) - ref_logps, row, beta))
        loss = torch.stack(step).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, torch.cat([p.detach().flatten() for p in policy.parameters()])
