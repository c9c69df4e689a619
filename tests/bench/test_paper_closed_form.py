"""bench/paper/closed_form.py: the enumerated quantities are exact, and the claims hold at the quick version's size."""

import json

import numpy as np
import pytest
import torch

import dpofast
from bench.paper import closed_form
from bench.paper.closed_form_figure import flipped_margins
from bench.paper.closed_form_fit import SLOPE, fit
from bench.paper.enumerable import Space, kl, random_world, sample_pairs, sequence_logps, token_logps
from bench.paper.information import fisher, predicted_kl, scores

SPACE = Space(prompts=2, symbols=3, length=3)


@pytest.fixture(scope="module")
def world():
    return random_world(SPACE, seed=1)


def test_the_policy_is_autoregressive_and_counted(world):
    logps = sequence_logps(world.ref_head, SPACE)
    table = world.ref_head.view(3, 2, SPACE.contexts).log_softmax(0)
    for prompt in range(2):
        for number, (first, second, third) in enumerate(SPACE.all_responses().tolist()):
            rows = (first, 0), (second, 1 + first), (third, 4 + second)
            expected = sum(table[symbol, prompt, context] for symbol, context in rows)
            assert logps[prompt, number].item() == pytest.approx(expected.item(), abs=1e-12)
    torch.testing.assert_close(logps.exp().sum(1), torch.ones(2, dtype=torch.float64))
    probs = logps.exp()
    torch.testing.assert_close((probs * world.rewards.square()).sum(1), torch.ones(2, dtype=torch.float64))


def test_the_optimum_maximizes_reward_under_the_kl_penalty(world):
    ref, beta = sequence_logps(world.ref_head, SPACE), 0.3

    def objective(logps):
        return (logps.exp() * world.rewards).sum(1) - beta * kl(logps, ref)

    best = world.optimum(beta)
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = (best + 0.1 * torch.randn(best.shape, generator=draw, dtype=best.dtype)).log_softmax(1)
        assert (objective(other) < objective(best)).all()


def test_pairs_are_drawn_from_the_reference_and_labelled_by_bradley_terry(world):
    pairs = sample_pairs(world, 200_000, seed=0)
    counts = torch.bincount(pairs.flatten(), minlength=54).view(2, 27) / 400_000
    torch.testing.assert_close(
        counts, sequence_logps(world.ref_head, SPACE).exp(), atol=5e-3, rtol=0, check_dtype=False
    )
    margins = -world.rewards.flatten()[pairs].diff(dim=1).squeeze(1)
    # P(chosen better by m)/P(chosen worse by m) = e^m
    near = [((margins - middle).abs() < 0.1).sum().item() for middle in (1.0, -1.0)]
    assert near[0] / near[1] == pytest.approx(np.e, rel=0.1)
    flipped = -world.rewards.flatten()[sample_pairs(world, 200_000, seed=0, flipped=0.3)].diff(dim=1).squeeze(1)
    assert (flipped != margins).double().mean().item() == pytest.approx(0.3, abs=0.05)


def test_scores_are_the_gradients_of_log_probs(world):
    head = world.ref_head.clone().requires_grad_()
    logps = sequence_logps(head, SPACE)
    found = scores(logps[1].detach(), SPACE)
    for response in (0, 13, 26):
        (gradient,) = torch.autograd.grad(logps[1, response], head, retain_graph=True)
        torch.testing.assert_close(gradient.T[SPACE.contexts :].flatten(), found[response])
    mean = logps[1].detach().exp() @ found
    assert mean.abs().max() < 1e-12  # a score's mean is 0
    assert torch.linalg.matrix_rank(fisher(logps[1].detach(), found)) == SPACE.free_parameters


def test_the_fit_is_the_optimum_of_the_loss_as_the_head_s_own_path_computes_it(world):
    pairs, loss = sample_pairs(world, 300, seed=2), dpofast.PreferenceLoss(beta=0.5)
    result = fit(world, pairs, loss)
    assert result.slope <= SLOPE
    head = (world.ref_head + result.step).requires_grad_()
    steps = torch.cat([SPACE.steps + prompt * SPACE.contexts * 3 for prompt in range(2)])
    contexts, symbols = (steps // 3).flatten(), (steps % 3).flatten()
    hidden = torch.eye(2 * SPACE.contexts, dtype=torch.float64)[contexts]
    output = dpofast.linear_preference_loss(
        hidden,
        head,
        symbols,
        torch.arange(0, len(symbols) + 1, 3, dtype=torch.int32),
        pairs.int(),
        sequence_logps(world.ref_head, SPACE).flatten(),
        loss=loss,
    )
    output.loss.backward()
    assert output.loss.item() == pytest.approx(result.loss, abs=1e-12)
    assert head.grad.abs().max() < 1e-6
    assert token_logps(head, SPACE).shape == (2 * SPACE.contexts * 3,)


def test_the_prediction_holds_where_pairs_are_many(world):
    loss = dpofast.PreferenceLoss(beta=1.0)
    optimum = world.optimum(1.0)
    divergences = []
    for seed in range(10):
        step = fit(world, sample_pairs(world, 20_000, seed=seed), loss).step
        divergences.append(kl(sequence_logps(world.ref_head + step, SPACE), optimum).mean().item())
    # 10 · 2 prompts of 14 parameters each: the mean's relative error is sqrt(2/280)
    assert 20_000 * np.mean(divergences) == pytest.approx(predicted_kl(world, 1.0, draws=50_000), rel=0.3)


def test_what_flipped_labels_make_of_a_margin():
    plain, smoothed, robust = flipped_margins(np.array([-50.0, 0.0, 1.0, 50.0]), 0.2)
    assert plain[[0, 3]] == pytest.approx([-np.log(4), np.log(4)]) and plain[1] == 0
    assert smoothed[3] == pytest.approx(np.log(0.68 / 0.32)) and 0 < smoothed[2] < plain[2] < robust[2] == 1


@pytest.mark.slow(15)
def test_the_quick_version_shows_the_theorem(tmp_path, capsys):
    assert closed_form.main(["--quick", "--work", str(tmp_path)]) == 0
    assert (tmp_path / "closed_form.png").stat().st_size > 10_000
    found = json.loads((tmp_path / "paper.jsonl").read_text())["figures"]
    most = str(max(closed_form.QUICK.pairs))
    for by_beta in found["clean"].values():
        last = by_beta["pairs"][most]
        assert last["kl"][0] * int(most) == pytest.approx(by_beta["predicted_kl_times_pairs"], rel=0.6)
        assert -1.4 < by_beta["rate"][0] < -0.7
        assert last["correlation"][0] > 0.995 and last["regression"][0] == pytest.approx(1, abs=0.03)
        assert last["kl"][0] < 0.02 * last["kl_reference"][0] and last["slope_left"][0] <= SLOPE
    # the reward found does not depend on β, but for rounding
    first, second = (by_beta["pairs"][most]["regression"][0] for by_beta in found["clean"].values())
    assert first == pytest.approx(second, abs=1e-4)
    plain, cdpo, robust = (found["flipped"][kind][most] for kind in ("plain", "cdpo", "robust"))
    assert cdpo["regression"][0] < 0.35 < plain["regression"][0] < 0.6
    assert robust["regression"][0] == pytest.approx(1, abs=0.05)
    assert robust["kl"][0] < plain["kl"][0] / 10 < cdpo["kl"][0] / 10
    assert "flipped" in capsys.readouterr().out
