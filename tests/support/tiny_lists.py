"""Lists of responses, and pairs with columns, for the tiny models."""

import random

from datasets import Dataset

from tests.support.tiny import VOCAB, tiny_pairs


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
