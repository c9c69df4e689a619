"""bench/paper/rankings.py: rankings are Plackett-Luce's, those of two are pairs, and more of them are worth more."""

import itertools
import json
import math

import pytest
import torch

import dpofast
from bench.paper import rankings
from bench.paper.closed_form_fit import SLOPE, fit
from bench.paper.enumerable import Space, kl, random_world, sample_pairs, sample_rankings, sequence_logps
from bench.paper.information import predicted_kl

SPACE = Space(prompts=2, symbols=3, length=3)
RANKED = dpofast.PreferenceLoss(kind="plackett_luce", beta=1.0)


@pytest.fixture(scope="module")
def world():
    return random_world(SPACE, seed=1)


def test_rankings_of_two_are_the_pairs_and_have_their_optimum(world):
    pairs = sample_pairs(world, 3000, seed=2)
    ranked = sample_rankings(world, 3000, 2, seed=2)
    assert torch.equal(ranked, pairs)
    ours, theirs = fit(world, ranked, RANKED), fit(world, pairs, dpofast.PreferenceLoss(beta=1.0))
    assert ours.slope <= SLOPE
    assert ours.loss == pytest.approx(theirs.loss, abs=1e-13)
    torch.testing.assert_close(ours.step, theirs.step, atol=1e-9, rtol=0)


def test_rankings_are_drawn_from_the_reference_and_ranked_by_plackett_luce(world):
    ranked = sample_rankings(world, 400_000, 3, seed=0)
    assert ranked.shape == (800_000, 3)
    drawn = torch.bincount(ranked.flatten(), minlength=54).view(2, 27) / 1_200_000
    probs = sequence_logps(world.ref_head, SPACE).exp()
    torch.testing.assert_close(drawn, probs, atol=5e-3, rtol=0, check_dtype=False)
    # the orders of the set of three likely responses of a prompt, against a product of choices
    responses = probs[0].topk(3).indices.tolist()
    orders = list(itertools.permutations(responses))
    counts = [int((ranked == torch.tensor(order)).all(1).sum()) for order in orders]
    for order, count in zip(orders, counts, strict=True):
        strengths = [math.exp(world.rewards[0, response].item()) for response in order]
        expected = strengths[0] / sum(strengths) * strengths[1] / sum(strengths[1:])
        error = math.sqrt(expected * (1 - expected) / sum(counts))
        assert count / sum(counts) == pytest.approx(expected, abs=4.5 * error)
    assert sum(counts) > 2000


def test_the_fit_of_rankings_minimizes_the_paper_s_loss(world):
    ranked = sample_rankings(world, 400, 4, seed=3)
    result = fit(world, ranked, RANKED)
    assert result.slope <= SLOPE
    head = (world.ref_head + result.step).requires_grad_()
    scores = (sequence_logps(head, SPACE) - sequence_logps(world.ref_head, SPACE)).flatten()[ranked]
    loss = sum((scores[:, place:].exp().sum(1).log() - scores[:, place]).mean() for place in range(3))
    loss.backward()
    assert loss.item() == pytest.approx(result.loss, abs=1e-12)
    assert head.grad.abs().max() < 1e-6


def test_the_prediction_holds_for_rankings(world):
    optimum, divergences = world.optimum(1.0), []
    for seed in range(6):
        step = fit(world, sample_rankings(world, 3_000, 4, seed=seed), RANKED).step
        divergences.append(kl(sequence_logps(world.ref_head + step, SPACE), optimum).mean().item())
    # 6 · 2 prompts of 14 parameters each: the mean's relative error is sqrt(2/168)
    predicted = predicted_kl(world, 1.0, responses=4, draws=20_000)
    assert sum(divergences) / 6 * 3_000 == pytest.approx(predicted, rel=0.3)
    assert predicted_kl(world, 1.0, draws=20_000) > 3 * predicted


def test_all_pairs_are_those_of_the_rankings(world):
    ranked = rankings.sample(world, "rankings", 5, seed=4)
    pairs = rankings.sample(world, "all_pairs", 5, seed=4).tolist()
    assert pairs == [list(pair) for row in ranked.tolist() for pair in itertools.combinations(row, 2)]
    assert rankings.sample(world, "pairs", 5, seed=4).shape == (10, 2)


@pytest.mark.slow(20)
def test_the_quick_version_shows_what_rankings_are_worth(tmp_path, capsys):
    assert rankings.main(["--quick", "--work", str(tmp_path)]) == 0
    assert (tmp_path / "rankings.png").stat().st_size > 10_000
    found = json.loads((tmp_path / "paper.jsonl").read_text())["figures"]
    most = str(max(rankings.QUICK.counts))
    for by_beta in found["betas"].values():
        kls = {method: counts[most]["kl"][0] for method, counts in by_beta["methods"].items()}
        assert by_beta["pairs_over_rankings"][most][0] == pytest.approx(kls["pairs"] / kls["rankings"])
        assert kls["rankings"] < kls["pairs"] / 2.5 and kls["rankings"] < 1.2 * kls["all_pairs"]
        predicted = by_beta["predicted_kl_times_count"]["rankings"]
        assert kls["rankings"] * int(most) == pytest.approx(predicted, rel=0.6)
        assert all(counts[most]["slope_left"][0] <= SLOPE for counts in by_beta["methods"].values())
    assert "rankings of 4" in capsys.readouterr().out
