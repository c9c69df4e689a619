"""Intervals against known values and coverage, the length statistics against plain counting, and the records."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dpofast.evaluation.pair_records import PairRecords, PairTable
from dpofast.evaluation.statistics import length_statistics, mean, share
from dpofast.losses.functional import PreferenceOutput
from dpofast.packing.pack import pack
from tests.support.tiny import tiny_pairs


def table(margins, lengths):
    margins = np.asarray(margins, float)
    rewards = np.stack([margins / 2, -margins / 2], axis=1)
    return PairTable(np.arange(len(margins)), rewards, rewards, np.asarray(lengths), np.zeros(len(margins)))


def test_wilson_interval_of_known_values():
    # Newcombe 1998, table I: 81 of 263, and 0 of 20.
    found = share(np.arange(263) < 81)
    assert (found.value, found.low, found.high) == pytest.approx((81 / 263, 0.2553, 0.3662), abs=1e-4)
    none = share(np.zeros(20, bool))
    assert (none.low, none.high) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert math.isnan(share(np.zeros(0, bool)).value) and mean(np.zeros(0)).count == 0


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    draw = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        found = mean(draw.normal(1.0, 2.0, 80), resamples=200, seed=seed)
        hits += found.low <= 1.0 <= found.high
    assert 0.89 <= hits / 200 <= 0.99
    assert mean(np.arange(10.0)) == mean(np.arange(10.0))


def test_length_statistics_are_plain_counts():
    #           right  right  wrong  right  wrong  tie     right, equal lengths
    margins = [1.0, 2.0, -1.0, 0.5, -2.0, 0.0, 3.0]
    lengths = [[5, 2], [6, 2], [4, 2], [2, 5], [1, 3], [9, 2], [3, 3]]
    found = length_statistics(table(margins, lengths))
    assert found.accuracy_chosen_longer.value == 2 / 4 and found.accuracy_chosen_shorter.value == 1 / 2
    assert found.accuracy_balanced == pytest.approx(0.5) and found.chosen_longer == 4 / 6
    assert found.longer_preferred.value == 3 / 5 and found.longer_preferred.count == 5
    assert found.preferred_length == pytest.approx(np.mean([5, 6, 2, 2, 3, 5.5, 3]))
    longer = [3, 4, 2, -3, -2, 7, 0]
    assert found.margin_correlation == pytest.approx(np.corrcoef(margins, longer)[0, 1])
    low, high = found.accuracy_balanced_interval
    assert low < 0.5 < high


def test_a_reward_that_is_length_gets_a_balanced_accuracy_of_one_half():
    draw = np.random.default_rng(0)
    lengths = np.stack([draw.integers(20, 40, 500), draw.integers(1, 30, 500)], axis=1)
    found = length_statistics(table(lengths[:, 0] - lengths[:, 1], lengths))
    assert found.chosen_longer > 0.9 and found.accuracy_balanced == 0.5
    assert found.longer_preferred.value == 1.0 and found.margin_correlation == pytest.approx(1.0)


def test_what_cannot_be_known_is_left_out_of_the_metrics():
    found = length_statistics(table([1.0, math.nan], [[3, 2], [5, 1]]))
    assert set(found.metrics()) == {"length/accuracy_chosen_longer", "length/longer_preferred", "lengths/preferred"}
    assert length_statistics(table([], np.empty((0, 2), int))).metrics() == {}


def outputs(examples, margins):
    """What an evaluation hands over for examples with these margins: batches and outputs."""
    for batch in pack(examples, 40):
        rewards = torch.stack([margins[batch.pair_examples], torch.zeros(len(batch.pairs))], dim=1)
        yield batch, PreferenceOutput(rewards.sum(), rewards[:, 0], 2 * rewards, rewards)


@pytest.mark.parametrize("at_once", [3, 4096])
def test_records_hold_every_pair_once_and_the_tokens_of_the_extremes(monkeypatch, at_once):
    monkeypatch.setattr("dpofast.evaluation.pair_records._READ_AT_ONCE", at_once)
    examples = [{**example, "row": 7 * i} for i, example in enumerate(tiny_pairs(30))]
    margins = torch.linspace(-3, 3, 30)[torch.randperm(30)]
    margins[4] = torch.nan
    records = PairRecords(kept=3)
    for start in (0, 15):  # two steps, each of several micro-batches
        part = SimpleNamespace(examples=examples[start : start + 15], margins=margins[start : start + 15])
        for batch, output in outputs(part.examples, part.margins):
            records.add(part.examples, batch, output)
    found = records.table()
    order = np.argsort(found.rows)
    np.testing.assert_allclose(found.margins[order], margins.double().numpy())
    lengths = [[len(example["chosen_ids"]), len(example["rejected_ids"])] for example in examples]
    assert found.rows[order].tolist() == [7 * i for i in range(30)] and found.lengths[order].tolist() == lengths
    np.testing.assert_allclose(found.logps, 2 * found.rewards)
    ranked = sorted((float(m), i) for i, m in enumerate(margins) if not math.isnan(m))
    assert [pair.example["row"] // 7 for pair in records.worst()] == [i for _, i in ranked[:3]]
    assert [pair.example["row"] // 7 for pair in records.best()] == [i for _, i in ranked[:-4:-1]]
    assert all(found.margins[pair.place] == pair.margin for pair in (*records.worst(), *records.best()))
    assert len(records.table()) == 30, "asking twice changes nothing"


def test_no_pairs_are_an_empty_table():
    records = PairRecords()
    assert len(records.table()) == 0 and records.best() == records.worst() == []
