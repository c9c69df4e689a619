"""bench.lists: the lists that it makes, what it counts and checks, and a small run of it."""

import itertools
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from bench import lists, markdown
from bench.cases import RandomProfile
from bench.random_pairs import random_lists, write_model

PROFILE = RandomProfile(prompt_median=9, response_median=6, vocab_size=64, hidden_size=64, layers=1)


def test_lists_are_written_as_lists_and_as_all_of_their_pairs(tmp_path):
    made, files = lists.write_rows(tmp_path, PROFILE, 3, 4)
    rows = [json.loads(line) for line in files[lists.LISTS].read_text().splitlines()]
    pairs = [json.loads(line) for line in files[lists.PAIRS].read_text().splitlines()]
    assert files[lists.BASE] == files[lists.PAIRS]
    assert len(rows) == len(made) == 3 and len(pairs) == 18
    for (prompt, responses), row, of_row in zip(made, rows, zip(*[iter(pairs)] * 6, strict=True), strict=True):
        assert row["prompt"] == "".join(f"w{token} " for token in prompt)
        assert row["responses"] == ["".join(f"w{token} " for token in ids[:-1]) for ids in responses]
        assert row["ranks"] == [1, 2, 3, 4] and {ids[-1] for ids in responses} == {0}
        expected = list(itertools.combinations(row["responses"], 2))
        assert [(pair["chosen"], pair["rejected"]) for pair in of_row] == expected
        assert {pair["prompt"] for pair in of_row} == {row["prompt"]}


def test_the_system_prompt_stands_before_every_prompt_of_lists():
    profile = RandomProfile(prompt_median=9, response_median=6, system=5, vocab_size=64)
    prompts = [prompt for prompt, _ in random_lists(profile, 3, 2)]
    assert all(np.array_equal(prompt[:5], prompts[0][:5]) for prompt in prompts)


def test_positions_are_the_prompt_and_each_response_less_its_last_token():
    prompt, responses = [5, 6, 7], [[8, 9, 0], [10, 0], [11, 12, 13, 0]]
    assert lists.positions_of([(prompt, responses)]) == 3 + 2 + 1 + 3
    assert lists.positions_of([(prompt, [*responses, [8, 9, 14, 0]])]) == 3 + 2 + 1 + 3 + 1
    with pytest.raises(ValueError, match="ran 10 positions, by the formula 9; nothing is recorded"):
        lists.check_positions(10.0, 9.0)


def test_the_restatement_is_the_paper_s_product_of_choices(tmp_path):
    write_model(tmp_path, PROFILE)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path).double() for _ in range(2)]
    with torch.no_grad():
        models[0].lm_head.weight.mul_(1.5)
    made, _ = lists.write_rows(tmp_path, PROFILE, 2, 3)
    expected = []
    for prompt, responses in made:
        strengths = []
        for ids in responses:
            sums = []
            for model in models:
                logps = model(torch.tensor([prompt + ids])).logits[0].log_softmax(1)
                sums.append(sum(logps[len(prompt) - 1 + place, token] for place, token in enumerate(ids)))
            strengths.append((lists.BETA * (sums[0] - sums[1])).exp().item())
        product = strengths[0] / sum(strengths) * strengths[1] / sum(strengths[1:])
        expected.append(-np.log(product))
    assert lists.restated(*models, made) == pytest.approx(np.mean(expected), abs=1e-10)


def test_a_loss_that_is_off_its_restatement_is_refused(tmp_path, monkeypatch):
    write_model(tmp_path, PROFILE)
    made, _ = lists.write_rows(tmp_path, PROFILE, 2, 3)
    assert lists.check_list_loss(tmp_path, made) < lists.LIST_TOLERANCE
    monkeypatch.setattr(lists, "BETA", 0.2)
    assert lists.check_list_loss(tmp_path, made) < lists.LIST_TOLERANCE
    right = lists.restated
    monkeypatch.setattr(lists, "restated", lambda *args: right(*args) + 1e-4)
    with pytest.raises(ValueError, match="apart; nothing is recorded"):
        lists.check_list_loss(tmp_path, made)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--responses", "1"], "--responses must be at least 2, got 1"),
        (["--steps", "1"], "--steps must be at least 2 and --rounds at least 1, got 1 and 3"),
        (["--epochs", "4"], "--epochs must divide --steps, got 4 and 6"),
        (["--trl-pairs", "5"], "--trl-pairs must divide the 24 pairs of a step, got 5"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        lists.parse(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.slow(60)
def test_a_quick_run_counts_less_than_half_of_trl_s_positions(tmp_path, capsys):
    assert lists.main(["--quick", "--results", str(tmp_path / "lists.jsonl")]) == 0
    figures = json.loads((tmp_path / "lists.jsonl").read_text())["figures"]
    over = figures["lists_over"]
    assert over["trl-precompute"]["positions"] < 0.5 and over["trl-precompute"]["gemm_gflops"] < 0.5
    assert over["dpofast"]["positions"] == 1 and over["dpofast"]["gemm_gflops"] == pytest.approx(1)
    assert figures["list_loss_difference"] < lists.LIST_TOLERANCE
    # the policy of the first step is the reference: all 4! orders are alike, and both of a pair
    losses = {engine: row["losses"][0] for engine, row in figures["engines"].items()}
    assert losses["dpofast-lists"] == pytest.approx(np.log(24), abs=1e-5)
    assert losses["dpofast"] == pytest.approx(np.log(2), abs=1e-5)
    assert "a list of 4 over its 6 pairs by trl-precompute" in capsys.readouterr().out


def test_the_table_of_the_docs_gives_what_a_step_on_lists_has_of_each_engine(tmp_path):
    assert markdown.lists_table(tmp_path) == "No run is recorded yet."

    def row(positions, gflop, cpu, wall):
        work = {"positions": positions, "gemm_gflops": gflop}
        return {"work": work, "step_cpu_s": {"median": cpu}, "step_s": {"median": wall}}

    figures = {
        **{"profile": "medium", "responses": 4, "lists_per_step": 2},
        "mean_tokens": {"prompt": 100.4, "response": 50.0},
        "engines": {"dpofast-lists": row(500, 10.0, 1.0, 0.5), "trl-precompute": row(4000, 50.0, 4.0, 1.0)},
    }
    record = {
        "figures": figures,
        "device": {"cpu": "A(R) Processor", "cores": 2},
        "date": "2026-11-30T",
        "command": "c",
    }
    (tmp_path / "lists.jsonl").write_text(json.dumps(record) + "\n")
    caption, _, _, _, ours, theirs = markdown.lists_table(tmp_path).splitlines()
    assert "2 lists of 4 a step, prompts of 100 and responses of 50 tokens" in caption and "A, 2 cores" in caption
    assert ours == "| **dpofast-lists** | 500 | 1.00x | 10.00 | 1.00x | 1.00 | 1.00x | 0.50 | 1.00x |"
    assert theirs == "| trl-precompute | 4,000 | 0.12x | 50.00 | 0.20x | 4.00 | 0.25x | 1.00 | 0.50x |"
