"""Metrics of lists: by hand, against plain loops over pairs and orders, and as an evaluation sums and records them."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dpofast import pack
from dpofast.evaluation.list_metrics import list_metrics
from dpofast.evaluation.metrics import MetricSums, check_best_metric, evaluation_metrics, work_avoided
from dpofast.evaluation.pair_records import PairRecords
from dpofast.losses.config import PreferenceLoss
from dpofast.losses.functional import token_preference_loss
from tests.support.tiny import tiny_pairs
from tests.support.tiny_lists import tiny_lists

NAMES = ("accuracy", "ties", "kendall_tau", "ndcg", "best_of_k")


def one(rewards, ranks):
    found = list_metrics(torch.tensor([rewards]), torch.tensor([ranks]))
    return {name: float(value) for name, value in found.values().items()}


def dcg(ranks):
    """Of responses in this order: gain 2^rel − 1, rel = levels − 1 − rank, discounted by log2(1 + place)."""
    levels = max(ranks) + 1
    return sum((2 ** (levels - 1 - rank) - 1) / math.log2(1 + place) for place, rank in enumerate(ranks, 1))


def slow(rewards, ranks):
    """The same by loops over pairs, and over all orders that equal rewards allow."""
    pairs = [(i, j) for i, j in itertools.permutations(range(len(ranks)), 2) if ranks[i] < ranks[j]]
    signs = [np.sign(rewards[i] - rewards[j]) for i, j in pairs]
    orders = [
        order
        for order in itertools.permutations(range(len(ranks)))
        if all(rewards[one] >= rewards[other] for one, other in itertools.pairwise(order))
    ]
    largest = [rank for reward, rank in zip(rewards, ranks, strict=True) if reward == max(rewards)]
    values = (
        np.mean([sign > 0 for sign in signs]),
        np.mean([sign == 0 for sign in signs]),
        np.mean(signs),
        np.mean([dcg([ranks[i] for i in order]) for order in orders]) / dcg(sorted(ranks)),
        float(set(largest) == {0}),
    )
    return dict(zip(NAMES, values, strict=True))


def test_values_worked_by_hand():
    # 3 of 6 pairs right, 3 wrong; gains 7, 3, 1, 0 at places 3, 1, 4, 2
    found = one([1.0, 3.0, 0.0, 2.0], [0, 1, 2, 3])
    ideal = 7 + 3 / math.log2(3) + 1 / 2
    shown = 3 + 0 / math.log2(3) + 7 / 2 + 1 / math.log2(5)
    assert found == pytest.approx(
        {"accuracy": 0.5, "ties": 0.0, "kendall_tau": 0.0, "ndcg": shown / ideal, "best_of_k": 0.0}
    )
    # The tied worst two are no pair: both strictly ordered pairs are right, and tau is 1.
    perfect = {"accuracy": 1.0, "ties": 0.0, "kendall_tau": 1.0, "ndcg": 1.0, "best_of_k": 1.0}
    assert one([2.0, -1.0, 0.5], [0, 1, 1]) == pytest.approx(perfect)
    # Equal rewards are neither right nor wrong; the largest is shared by a worse response.
    found = one([1.0, 1.0, 0.0], [0, 1, 2])
    assert found == pytest.approx(
        {"accuracy": 2 / 3, "ties": 1 / 3, "kendall_tau": 2 / 3, "ndcg": found["ndcg"], "best_of_k": 0.0}
    )
    assert found["ndcg"] == pytest.approx((3 + 1) / 2 * (1 + 1 / math.log2(3)) / (3 + 1 / math.log2(3)))
    # The largest reward is that of two of the best rank.
    assert one([1.0, 1.0, 0.0], [0, 0, 1])["best_of_k"] == 1.0
    assert all(math.isnan(value) for value in one([1.0, 2.0], [0, 0]).values())


def test_random_lists_with_ties_against_plain_loops():
    draw = np.random.default_rng(0)
    lists = []
    for _ in range(60):
        size = int(draw.integers(2, 7))
        ranks = np.sort(draw.integers(0, 4, size))
        ranks = np.unique(ranks, return_inverse=True)[1].tolist()
        if ranks[-1] > 0:
            lists.append((draw.integers(-2, 3, size).astype(float).tolist(), ranks))
    rewards, all_ranks = torch.zeros(len(lists), 6), torch.full((len(lists), 6), -1)
    for row, (values, ranks) in enumerate(lists):
        rewards[row, : len(values)], all_ranks[row, : len(ranks)] = torch.tensor(values), torch.tensor(ranks)
    found = list_metrics(rewards, all_ranks)
    assert found.ordered.all() and len(lists) > 40
    for row, (values, ranks) in enumerate(lists):
        mine = {name: float(value[row]) for name, value in found.values().items()}
        assert mine == pytest.approx(slow(values, ranks)), (values, ranks)


def test_a_long_list_does_not_overflow():
    ranks = list(range(3000))
    assert one([-float(rank) for rank in ranks], ranks)["ndcg"] == pytest.approx(1.0)


def batch_and_output(rows, **loss):
    """A micro-batch of the rows, and the output of random token log-probs."""
    (batch,) = pack(rows)
    generator = torch.Generator().manual_seed(0)
    logps = -torch.rand(batch.num_targets, generator=generator)
    ref = -torch.rand(batch.num_sequences, generator=generator) * 3
    options = {"loss": PreferenceLoss(**loss), "columns": batch.columns}
    return batch, ref, logps, token_preference_loss(logps, batch.cu_targets, batch.pairs, ref, **options)


def test_an_evaluation_sums_and_records_lists():
    rows = tiny_lists(9, seed=2)
    batch, ref, logps, output = batch_and_output(rows, kind="plackett_luce", beta=0.3)
    sums, records = MetricSums(), PairRecords()
    sums.add_pairs(output, batch, 0.3)
    records.add([{**row, "row": number} for number, row in enumerate(with_sides(rows))], batch, output)
    means, table = sums.means(), records.table()
    expected, margins, kl = {name: [] for name in NAMES}, [], []
    for place, (members, ranks) in enumerate(
        zip(batch.columns.lists.tolist(), batch.columns.ranks.tolist(), strict=True)
    ):
        members, ranks = [m for m in members if m >= 0], [rank for rank in ranks if rank >= 0]
        rewards, lengths = [], []
        for member in members:
            own = slice(*batch.cu_targets[member : member + 2].tolist())
            rewards.append(0.3 * float(logps[own].double().sum() - ref[member]))
            lengths.append(own.stop - own.start)
        mine = slow(rewards, ranks)
        for name in NAMES:
            expected[name].append(mine[name])
            assert getattr(table.lists, name)[place] == pytest.approx(mine[name])
        assert table.lists.responses[place] == len(members)
        assert table.rewards[place] == pytest.approx([rewards[0], rewards[-1]], abs=1e-6)
        margins.append(rewards[0] - rewards[-1])
        kl.append(rewards[0] / 0.3 / lengths[0])
    assert len(margins) == 9
    for name, values in expected.items():
        logged = "rewards/accuracies" if name == "accuracy" else f"rewards/{name}"
        assert means[logged] == pytest.approx(np.mean(values))
    assert means["rewards/margins"] == pytest.approx(np.mean(margins), abs=1e-6)
    assert means["kl/chosen"] == pytest.approx(np.mean(kl), abs=1e-6)
    known = evaluation_metrics(with_reference=True, token_statistics=False, lists=True)
    assert set(means) | {"loss"} >= {name for name in known if not name.startswith("length")}
    assert records.worst()[0].margin == pytest.approx(min(margins), abs=1e-6)


def with_sides(rows):
    """The rows with a best and a worst response, as the trainer hands them on."""
    for row in rows:
        best = row["responses_ids"][int(np.argmax(row["scores"]))]
        yield {**row, "chosen_ids": best, "rejected_ids": row["responses_ids"][int(np.argmin(row["scores"]))]}


def test_pairs_have_no_metrics_of_lists():
    rows = [{**row, "row": number} for number, row in enumerate(tiny_pairs(5))]
    batch, *_, output = batch_and_output(rows)
    sums, records = MetricSums(), PairRecords()
    sums.add_pairs(output, batch, 0.1)
    records.add(rows, batch, output)
    assert not {"rewards/kendall_tau", "rewards/ndcg", "rewards/best_of_k"} & set(sums.means())
    assert records.table().lists is None


def test_kl_is_per_token_whatever_beta_and_weights_a_row_has():
    rows = tiny_pairs(6, seed=1)
    betas = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    for row, beta in zip(rows, betas, strict=True):
        row["beta"] = beta
        row["chosen_weights"] = [0.5 + (k % 3) for k in range(len(row["chosen_ids"]))]
        row["rejected_weights"] = [1.0] * len(row["rejected_ids"])
    batch, ref, logps, output = batch_and_output(rows)
    sums = MetricSums()
    sums.add_pairs(output, batch, 0.1)
    kl = []
    for pair, example in zip(batch.pairs.tolist(), batch.pair_examples.tolist(), strict=True):
        own = slice(*batch.cu_targets[pair[0] : pair[0] + 2].tolist())
        weights = torch.tensor(rows[example]["chosen_weights"], dtype=torch.float64)
        kl.append(float(((weights * logps[own]).sum() - ref[pair[0]]) / weights.sum()))
    assert sums.means()["kl/chosen"] == pytest.approx(np.mean(kl), abs=1e-6)


def test_metric_for_best_model_may_be_one_of_lists_where_there_are_lists():
    lists, pairs = (SimpleNamespace(column_names=names) for names in (["responses_ids"], ["chosen_ids"]))
    args = SimpleNamespace(metric_for_best_model="eval_rewards/kendall_tau", token_statistics=False)
    check_best_metric(args, True, lists)
    with pytest.raises(ValueError, match="metric_for_best_model: expected one of .* got 'eval_rewards/kendall_tau'"):
        check_best_metric(args, True, pairs)
    args.metric_for_best_model = "eval_ranked_rewards/ndcg"
    check_best_metric(args, True, {"ranked": lists, "plain": pairs})
    args.metric_for_best_model = "eval_plain_rewards/ndcg"
    with pytest.raises(ValueError, match="each with one of ranked_, plain_ in front of it"):
        check_best_metric(args, True, {"ranked": lists, "plain": pairs})


def test_a_padded_trainer_computes_a_row_for_every_response():
    row = {"prompt_ids": [1, 2, 3], "responses_ids": [[4, 5], [6], [7, 8, 9]], "ranks": [0, 1, 2]}
    (batch,) = pack([row])
    found = work_avoided([row], [batch])
    # 3 rows of 6 positions, 15 of them real; P + Σ(length − 1) = 6 are computed
    assert batch.num_tokens == 3 + 1 + 0 + 2
    assert found == {"padding_avoided": pytest.approx(1 - 15 / 18), "sharing_avoided": pytest.approx(1 - 6 / 15)}
