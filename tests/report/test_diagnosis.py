"""Every warning fires on a history made for it, and on no other."""

import math
from dataclasses import replace

import numpy as np
import pytest

from dpofast.evaluation.pair_records import PairTable
from dpofast.report.diagnosis import CHECKS, Run, diagnose


def pairs(margins, longer):
    """Pairs with these margins, whose chosen response has so many tokens more."""
    margins, longer = np.asarray(margins, float), np.asarray(longer)
    rewards = np.stack([margins, np.zeros(len(margins))], axis=1)
    lengths = np.stack([50 + longer, np.full(len(longer), 50)], axis=1)
    return PairTable(np.arange(len(margins)), rewards, rewards * 10, lengths, np.log1p(np.exp(-margins)))


def fair_pairs(count=200):
    draw = np.random.default_rng(0)
    return pairs(draw.normal(1.0, 0.8, count), draw.integers(-20, 21, count))


def train_log(step, loss, **other):
    return {"step": step, "loss": loss, "rewards/accuracies": 0.8, "rewards/margins": 1.0, **other}


def eval_log(step, loss, **other):
    names = {"displacement": 0.2, "rewards/chosen": 0.3, "kl/chosen": 0.05, "kl/rejected": -0.2, **other}
    return {"step": step, "eval_loss": loss, **{f"eval_{name}": value for name, value in names.items()}}


def history(losses=(0.69, 0.66, 0.63, 0.6, 0.57, 0.55, 0.53, 0.5), held_out=(0.69, 0.62, 0.58), every=(), **last):
    """A run that goes well: its losses; `every` are further values of training logs, `last` of the last evaluation."""
    logs = [train_log(10 * i, loss, **dict(every)) for i, loss in enumerate(losses, 1)]
    evaluations = [eval_log(40 * i, loss) for i, loss in enumerate(held_out)]
    if evaluations:
        evaluations[-1] |= {f"eval_{name}": value for name, value in last.items()}
    return sorted([*logs, *evaluations], key=lambda entry: entry["step"])


GROWING = [train_log(10 * i, 0.6 - 0.05 * i, **{"rewards/margins": 0.3 * i}) for i in range(1, 9)]
DRAW = np.random.default_rng(1)
LENGTHS = DRAW.integers(-30, 31, 200)
RUNS = {
    "not_finite": Run(history=[*history(), train_log(90, math.nan)], pairs=fair_pairs()),
    "loss_not_moving": Run(history=history(losses=[0.69, 0.7, 0.69, 0.68, 0.69, 0.69, 0.69]), pairs=fair_pairs()),
    "accuracy_at_chance": Run(history=history(), pairs=pairs(DRAW.normal(0, 1, 200), LENGTHS)),
    "overfitting": Run(history=[*GROWING, *[eval_log(20 * i, loss) for i, loss in enumerate([0.69, 0.6, 0.62, 0.7])]]),
    "likelihood_displacement": Run(
        history=history(**{"displacement": 0.8, "rewards/chosen": -0.3}), pairs=fair_pairs()
    ),
    "length_bias": Run(history=history(), pairs=pairs(0.6 + 0.05 * LENGTHS + DRAW.normal(0, 0.5, 200), LENGTHS)),
    "far_from_reference": Run(history=history(**{"kl/rejected": -1.5}), pairs=fair_pairs()),
    "saturated": Run(
        history=history(every={"rewards/accuracies": 1.0, "rewards/margins": 9.0}.items()), pairs=fair_pairs()
    ),
    "truncation": Run(history=history(), pairs=fair_pairs(), responses=200, truncated=11),
}


@pytest.mark.parametrize("name", RUNS)
def test_each_warning_fires_on_exactly_its_case(name):
    (finding,) = diagnose(RUNS[name])
    assert finding.name == name and finding.title and finding.text and finding.advice


def test_every_check_has_a_case():
    assert list(RUNS) == [check.__name__ for check in CHECKS]


def test_a_run_that_goes_well_and_one_that_says_nothing_have_no_warning():
    assert diagnose(Run(history=history(), pairs=fair_pairs(), responses=200, truncated=10)) == []
    assert diagnose(Run(history=[])) == []
    assert diagnose(Run(history=[train_log(1, 0.69), {"step": 1, "train_runtime": 3.0}])) == []


def test_a_first_log_with_its_ties_is_no_accuracy_at_chance():
    logs = history(losses=[0.69], held_out=[0.69], every={"rewards/accuracies": 0.0}.items())
    assert diagnose(Run(history=logs)) == []


@pytest.mark.parametrize(
    ("name", "near_miss"),
    [
        ("loss_not_moving", Run(history=history(losses=[0.69] * 5))),  # too few logs
        ("loss_not_moving", Run(history=history(losses=[0.70, 0.69, 0.69, 0.69, 0.68, 0.68]))),
        ("accuracy_at_chance", Run(history=history(), pairs=pairs([1.0] * 9 + [-1.0] * 10, [0] * 19))),  # too few pairs
        ("overfitting", Run(history=history(held_out=[0.69, 0.6, 0.61]))),  # a rise that is noise
        ("overfitting", Run(history=history(held_out=[0.69, 0.6, 0.7]))),  # training does not grow either
        ("likelihood_displacement", Run(history=history(**{"displacement": 0.8, "rewards/chosen": -0.01}))),
        ("likelihood_displacement", Run(history=history(**{"displacement": 0.4, "rewards/chosen": -0.3}))),
        (
            "likelihood_displacement",
            Run(history=history(**{"displacement": 0.8, "rewards/chosen": -0.3}), with_reference=False),
        ),
        ("length_bias", Run(history=history(), pairs=pairs(2 + 0.02 * LENGTHS, LENGTHS))),  # right whatever the length
        ("far_from_reference", Run(history=history(**{"kl/rejected": -0.9}))),
        ("saturated", Run(history=history(every={"rewards/accuracies": 1.0, "rewards/margins": 4.0}.items()))),
        ("truncation", Run(history=history(), responses=200, truncated=10)),
    ],
)
def test_what_is_not_quite_a_case(name, near_miss):
    assert name not in [finding.name for finding in diagnose(near_miss)]


def test_length_bias_goes_both_ways_and_says_which():
    (finding,) = diagnose(Run(history=history(), pairs=pairs(0.6 - 0.05 * LENGTHS, LENGTHS)))
    assert finding.title == "The model prefers the shorter response" and "r = -1.00" in finding.text
    assert "--ld_alpha" in " ".join(finding.advice) and "simpo" in " ".join(finding.advice)


@pytest.mark.parametrize("side", [1, -1])
def test_length_bias_is_said_where_every_chosen_response_is_on_one_side(side):
    longer = side * DRAW.integers(8, 18, 60)
    follows = diagnose(Run(history=history(), pairs=pairs(side * 0.1 * longer, side * abs(longer))))
    (finding,) = diagnose(Run(history=history(), pairs=pairs(0.1 * abs(longer), longer)))
    which, other = ("longer", "shorter") if side > 0 else ("shorter", "longer")
    assert [found.name for found in follows] == ["length_bias"]
    assert finding.name == "length_bias" and finding.title == f"The model prefers the {which} response"
    assert f"the {which} one in 60 of 60 pairs, and margin and length difference correlate" in finding.text
    assert f"whose chosen response is the {other} one" in finding.advice[-1]


@pytest.mark.parametrize(
    ("margins", "longer"),
    [
        (np.full(60, 0.7), np.full(60, 10)),  # no spread at all, so that there is no correlation
        (DRAW.normal(1.0, 0.2, 60), DRAW.integers(8, 18, 60)),  # whatever the difference is
        (np.where(np.arange(60) < 3, -0.5, 0.7), np.where(np.arange(60) < 3, -1, 1) * 10),  # three pairs are no side
    ],
    ids=["constant", "uncorrelated", "three-of-the-other-side"],
)
def test_accuracy_that_may_be_length_alone_is_said(margins, longer):
    (finding,) = [f for f in diagnose(Run(history=history(), pairs=pairs(margins, longer))) if f.name == "length_bias"]
    assert f"longer one in {(longer > 0).sum()} of 60 pairs" in finding.text
    assert "accuracy of 100% may be that and nothing else" in finding.text


def test_one_sided_pairs_without_a_preference_or_among_pairs_of_equal_length_are_no_length_bias():
    chance = Run(history=history(), pairs=pairs(DRAW.normal(0, 1, 60), DRAW.integers(8, 18, 60)))
    assert "length_bias" not in [finding.name for finding in diagnose(chance)]
    mostly_equal = Run(history=history(), pairs=pairs(np.full(60, 0.7), np.where(np.arange(60) < 25, 9, 0)))
    assert diagnose(mostly_equal) == []


def test_a_loss_that_compares_log_probs_per_token_is_judged_by_them():
    # a nat less for each token of a rejected response, 0.8 for each of a chosen one: sums prefer the shorter response
    lengths = np.stack([50 + LENGTHS, np.full(200, 50)], axis=1)
    per_token = np.stack([-0.8 + DRAW.normal(0, 0.1, 200), np.full(200, -1.0)], axis=1)
    table = PairTable(np.arange(200), per_token * lengths, per_token * lengths, lengths, np.full(200, 0.5))
    assert [found.name for found in diagnose(Run(history=history(), pairs=table))] == ["length_bias"]
    assert diagnose(Run(history=history(), pairs=table, per_token=True)) == []
    biased = replace(table, rewards=(per_token + np.stack([0.05 * LENGTHS, 0 * LENGTHS], axis=1)) * lengths)
    (finding,) = diagnose(Run(history=history(), pairs=biased, per_token=True))
    assert finding.name == "length_bias" and finding.text.startswith("Margin per token")
    assert "simpo" not in " ".join(finding.advice)


def test_an_nll_term_does_not_hide_that_the_loss_moves():
    losses = [3.02, 3.01, 3.0, 2.98, 2.97, 2.96]
    assert diagnose(Run(history=history(losses=losses), pairs=fair_pairs())) == []


def test_a_loss_that_rises_is_told_from_one_that_stands_still():
    (still,) = diagnose(RUNS["loss_not_moving"])
    (risen,) = diagnose(Run(history=history(losses=[0.69, 0.7, 0.75, 0.8, 0.9, 1.0]), pairs=fair_pairs()))
    assert still.title == "The training loss has hardly moved" and "Raise the learning rate" in still.advice[0]
    assert risen.title == "The training loss has risen" and "Lower the learning rate" in risen.advice[0]


def test_without_held_out_pairs_training_is_looked_at():
    logs = history(held_out=(), every={"displacement": 0.9, "rewards/chosen": -1.0, "rewards/accuracies": 0.5}.items())
    assert [finding.name for finding in diagnose(Run(history=logs))] == [
        "accuracy_at_chance",
        "likelihood_displacement",
    ]


@pytest.mark.parametrize(("margin", "said"), [(0.4, "grew because the rejected ones"), (-0.4, "shrank all the same")])
def test_displacement_says_what_the_margin_did(margin, said):
    logs = history(**{"displacement": 0.9, "rewards/chosen": -1.0, "rewards/margins": margin})
    (displaced,) = (found for found in diagnose(Run(history=logs)) if found.name == "likelihood_displacement")
    assert f"The margin {said}" in displaced.text


def test_several_held_out_sets_are_told_apart():
    logs = [{name.replace("eval_", "eval_b_"): value for name, value in entry.items()} for entry in history()]
    assert Run(history=logs, prefix="eval_b").held_out()[-1] == (80, 0.58) and Run(history=logs).held_out() == []
