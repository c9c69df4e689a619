"""bench/paper/sentiment.py: the optimum, the pairs, the losses, and a quick run as a whole."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from bench.paper import frontier, review_lm, sentiment, sentiment_methods, sentiment_smollm2
from bench.paper.reward import reward
from bench.paper.sampling import Samples
from dpofast import attach_logprob_head, pack
from dpofast.reference import logprobs
from tests.support.tiny import tiny_model


def pool(prefixes: int = 3, count: int = 40) -> torch.Tensor:
    return torch.randn(prefixes, count, generator=torch.Generator().manual_seed(0))


def test_importance_weights_sum_to_one_and_give_the_tilted_distribution() -> None:
    rewards = pool()
    weights = frontier.importance_weights(rewards, 0.3)
    assert torch.allclose(weights.sum(-1), torch.ones(3, dtype=torch.float64))
    point = frontier.optimum(rewards, 0.3)
    count = rewards.shape[1]
    kl = (weights * (weights * count).log()).sum(-1).mean()  # of the weights from the uniform ones
    assert point.kl == pytest.approx(float(kl), rel=1e-9)
    assert point.reward == pytest.approx(float((weights * rewards).sum(-1).mean()))
    assert 1 <= point.effective_samples <= count
    assert frontier.optimum(rewards, 1e6).kl == pytest.approx(0, abs=1e-9)
    assert frontier.optimum(rewards, 1e6).effective_samples == pytest.approx(count)


def test_points_that_few_samples_carry_are_not_reliable() -> None:
    assert frontier.optimum(pool(), 5.0).reliable and not frontier.optimum(pool(), 0.05).reliable


def test_the_frontier_rises_and_no_policy_is_above_it() -> None:
    rewards = pool()
    points = frontier.frontier(rewards, (5, 2, 1, 0.5, 0.2, 0.1))
    for a, b in itertools.pairwise(points):
        assert a.kl < b.kl and a.reward < b.reward
    for n in (2, 4, 8, 16):
        assert frontier.best_of_n(rewards, n) < frontier.reward_at(rewards, frontier.best_of_n_kl_bound(n)).reward
    # Any other tilt with as much divergence earns less.
    other = (0.7 * rewards + pool(3, 40).flip(1)).double().softmax(-1)
    kl = float((other * (other * 40).log()).sum(-1).mean())
    at = frontier.reward_at(rewards, kl)
    assert at.kl == pytest.approx(kl, rel=1e-6)
    assert float((other * rewards).sum(-1).mean()) < at.reward


def test_best_of_n_is_the_mean_over_all_choices() -> None:
    rewards = pool(1, 7)
    for n in (1, 3, 7):
        choices = [max(choice) for choice in itertools.combinations(rewards[0].tolist(), n)]
        assert frontier.best_of_n(rewards, n) == pytest.approx(sum(choices) / len(choices))
    assert frontier.best_of_n_kl_bound(1) == 0
    with pytest.raises(ValueError, match="n: expected 1 to 7, the samples of a prefix, got 8"):
        frontier.best_of_n(rewards, 8)


def test_the_hull_is_what_mixtures_reach() -> None:
    points = [(0.0, 1.0), (1.0, 1.1), (2.0, 3.0), (3.0, 2.0)]
    assert frontier.hull_reward(points, 1.0) == 2.0
    assert frontier.hull_reward(points, 2.5) == frontier.hull_reward(points, 9.0) == 3.0
    with pytest.raises(ValueError, match="expected one with a divergence of at most 0.5"):
        frontier.hull_reward(points[1:], 0.5)


def test_four_completions_make_six_pairs_whose_labels_are_bradley_terrys() -> None:
    completions = [[1], [2], [3], [4]]
    samples = Samples([[9]] * 4000, completions * 1000, [""] * 4000)
    pairs = sentiment_methods.preference_pairs(samples, torch.tensor([0.0, 1.0, 2.0, -1.0] * 1000), seed=0)
    assert len(pairs) == 6 * 1000
    for pair in pairs[:6]:
        assert pair["prompt_ids"] == [9]
    assert {frozenset((p["chosen_ids"][0], p["rejected_ids"][0])) for p in pairs[:6]} == {
        frozenset(pair) for pair in itertools.combinations((1, 2, 3, 4), 2)
    }
    for one, other, difference in ((1, 2, -1.0), (3, 4, 3.0)):
        wins = sum((p["chosen_ids"], p["rejected_ids"]) == ([one], [other]) for p in pairs)
        probability = 1 / (1 + math.exp(-difference))
        assert wins / 1000 == pytest.approx(probability, abs=5 * math.sqrt(probability * (1 - probability) / 1000))


def test_equal_completions_make_no_pair() -> None:
    samples = Samples([[9]] * 4, [[1], [2], [1], [3]], [""] * 4)
    assert len(sentiment_methods.preference_pairs(samples, torch.zeros(4), seed=0)) == 5


def test_positions_are_what_each_way_computes() -> None:
    pairs = [
        {"prompt_ids": [9, 8], "chosen_ids": [1, 1, 1], "rejected_ids": [2]},
        {"prompt_ids": [9, 8], "chosen_ids": [1, 1, 1], "rejected_ids": [3, 3]},
    ]
    task = sentiment_methods.Task(
        reference=None, tokenizer=None, prefixes=[], samples=None, pairs=pairs, ties=0, max_new_tokens=3, steps=1,
        prefixes_per_step=1, seed=0,
    )  # fmt: skip
    # A branch's last token is only a target.
    assert sentiment_methods.positions(task) == {
        "packed": 2 + 2 + 0 + 1,
        "prompt_shared": (2 + 2 + 0) + (2 + 2 + 1),
        "unshared": 2 * 4 + 3 + 1 + 3 + 2,
        "padded": 4 * 5,
    }


@torch.no_grad()
def test_the_unlikelihood_loss_is_its_formula_over_the_pairs() -> None:
    model = attach_logprob_head(tiny_model())
    pairs = [
        {"prompt_ids": [9, 8], "chosen_ids": [11, 12, 13], "rejected_ids": [14, 15]},
        {"prompt_ids": [9, 8], "chosen_ids": [11, 12, 13], "rejected_ids": [16]},
        {"prompt_ids": [9, 8], "chosen_ids": [14, 15], "rejected_ids": [16]},
    ]
    (batch,) = pack(pairs)
    found = sentiment_methods.unlikelihood_loss(model(packed=batch).logps, batch.pairs, batch.cu_targets, 0.3)
    total, tokens = 0.0, 0
    for pair in pairs:
        for name in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor(pair["prompt_ids"] + pair[name])
            logps = logprobs(model(ids[None]).logits[0, 1:-1].double(), ids[2:])
            total -= float(logps.sum()) if name == "chosen_ids" else 0.3 * float((1 - logps.exp()).log().sum())
        tokens += len(pair["chosen_ids"])
    assert float(found) == pytest.approx(total / tokens, rel=1e-5)
    certain = sentiment_methods.unlikelihood_loss(torch.zeros(2), torch.tensor([[0, 1]]), torch.tensor([0, 1, 2]), 1.0)
    assert math.isfinite(float(certain))


@pytest.mark.slow(40)
def test_a_quick_run_shows_what_must_hold(one_thread, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = tmp_path / "work"
    assert sentiment.main(["--quick", "--work", str(work)]) == 0
    printed = capsys.readouterr().out
    assert "made-up reviews" in printed and "| optimum π* |" in printed
    assert (work / "sentiment.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((work / "paper.jsonl").read_text())
    assert record["name"] == "paper/sentiment" and "--quick" in record["command"]
    figures = record["figures"]
    start = figures["reference_reward"][0]
    levels = figures["levels"]
    for level, _ in enumerate(levels["kl"]):
        assert levels["optimum"][level][0] > levels["dpo"][level][0] > start
    assert levels["dpo"][-1][0] > levels["preferred"][-1][0] and levels["dpo"][-1][0] > levels["unlikelihood"][-1][0]
    last = {(p["method"], p["strength"]): p for p in figures["points"] if p["step"] == sentiment.QUICK.looks[-1]}
    strong, weak = (strength for strength, _ in sentiment_methods.METHODS["dpo"].quick_runs)
    for strength in (strong, weak):
        assert last["dpo", strength]["reward"][0] > start + 0.3
    assert 0 < last["dpo", weak]["kl"][0] < last["dpo", strong]["kl"][0]
    assert figures["above_optimum"] < 0.3
    points = figures["frontier"]
    for a, b in itertools.pairwise(points):
        assert a["kl"][0] < b["kl"][0] and a["reward"][0] < b["reward"][0]
    for row in figures["best_of_n"]:
        curve = [(p["kl"][0], p["reward"][0]) for p in points]
        assert row["reward"][0] < frontier.hull_reward([(0.0, start), *curve], row["kl_bound"]) + 0.15
    counts = figures["pairs"]
    seeds = len(sentiment.QUICK.seeds)
    assert counts["pairs"] + counts["ties"] == 6 * sentiment.QUICK.prefixes * seeds
    # Six pairs of four completions: three appearances of each.
    assert counts["positions"]["packed"] < counts["positions"]["prompt_shared"] / 2.5
    # What lies in the work folder is not computed again.
    assert sentiment.main(["--quick", "--work", str(work)]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.slow(5)
def test_the_confirming_run_looks_at_the_same_figures(
    one_thread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Any causal language model's folder will do.
    monkeypatch.setattr(sentiment_smollm2, "MODEL", tmp_path / "model")
    assert sentiment_smollm2.main(["--quick", "--work", str(tmp_path / "work")]) == 2
    assert "make it with: python -m bench.smollm2" in capsys.readouterr().err
    review_lm.reference(tmp_path / "model", True, review_lm.made_up_reviews(300))
    assert sentiment_smollm2.main(["--quick", "--work", str(tmp_path / "work")]) == 0
    assert "| step | KL | reward |" in capsys.readouterr().out
    figures = json.loads((tmp_path / "work" / "paper.jsonl").read_text())["figures"]
    first, *_, last = figures["points"]
    assert first["step"] == first["kl"] == 0 < last["kl"]  # the adapter begins as nothing
    assert figures["pairs"] + figures["ties"] == 6 * sentiment_smollm2.QUICK.prefixes


def test_the_made_up_reviews_are_good_and_bad() -> None:
    texts = [review.text for review in review_lm.made_up_reviews(200)]
    rewards = reward(texts)
    assert float(rewards.std()) > 1 and (rewards > 1).sum() > 40 and (rewards < -1).sum() > 40
