"""Random lists of responses for the tests of list losses: ragged, with ties, in one call."""

import torch

from dpofast.losses.columns import PreferenceColumns


def dense(scores):
    """The ranks of scores, from 0 for the largest, equal for equal ones."""
    return [sorted(set(scores), reverse=True).index(score) for score in scores]


def random_lists(seed=0, sizes=(2, 3, 4, 5, 6, 6, 3, 2), levels=4):
    """Scores and ranks of lists, best first: few levels, so that many responses tie; never all of a list."""
    generator = torch.Generator().manual_seed(seed)
    lists = []
    for size in sizes:
        drawn = [int(torch.randint(levels, (), generator=generator)) for _ in range(size - 2)]
        scores = sorted([0.0, levels / levels, *(level / levels for level in drawn)], reverse=True)
        lists.append((scores, dense(scores)))
    return lists


def columns_of(lists, *, width=0, scores=True, **others):
    """PreferenceColumns of lists of (scores, ranks) over consecutive sequences, and their (best, worst) pairs."""
    width = max(width, *(len(ranks) for _, ranks in lists))
    members, start = [], 0
    for _, ranks in lists:
        members.append([*range(start, start + len(ranks))])
        start += len(ranks)

    def table(rows, fill, dtype):
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=dtype)

    columns = PreferenceColumns(
        lists=table(members, -1, torch.int32),
        ranks=table([ranks for _, ranks in lists], -1, torch.int32),
        scores=table([each for each, _ in lists], 0, torch.float32) if scores else None,
        **others,
    )
    return columns, torch.tensor([[row[0], row[-1]] for row in members], dtype=torch.int32)


def random_logps(count, seed=1, spread=8.0):
    """Log-probs of `count` sequences under policy and reference, (count,) float64 each."""
    generator = torch.Generator().manual_seed(seed)
    policy, ref = (-10 - spread * torch.rand(2, count, generator=generator, dtype=torch.float64)).unbind()
    return policy, ref
