"""score_rows: the trainer's own numbers, row by row, in order, with memory for a window."""

import contextlib

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from dpofast import DPOConfig, DPOTrainer, attach_logprob_head, reference
from dpofast.scoring import score
from dpofast.scoring.score import Forward, response_logps, score_rows
from tests.support.tiny import tiny_dataset, tiny_model, tiny_pairs

OPTIONS = {"beta": 0.3, "max_tokens": 64, "share": "prefix", "max_logits_bytes": None}
OPTIONS |= {"device": torch.device("cpu")}
POLICY = {"chosen_logps", "rejected_logps", "chosen_tokens", "rejected_tokens"}
REFERENCE = {"ref_chosen_logps", "ref_rejected_logps", "chosen_rewards", "rejected_rewards", "margins"}


@pytest.fixture
def models():
    policy, ref = attach_logprob_head(tiny_model()), attach_logprob_head(tiny_model())
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.5)
    return policy, ref


def truth(model, example, name):
    with torch.no_grad():
        logps = reference.padded_logprobs(model, **reference.padded_rows([(example["prompt_ids"], example[name])]))
    return float(logps.sum())


@pytest.mark.parametrize("window", [1, 4, 100])
@pytest.mark.parametrize("form", [list, iter, Dataset.from_list])
def test_every_row_in_order(models, form, window):
    policy, ref = models
    examples = tiny_pairs(11)
    rows = list(score_rows(form(examples), policy, ref, window=window, **OPTIONS))
    assert len(rows) == 11
    for row, example in zip(rows, examples, strict=True):
        assert set(row) == POLICY | REFERENCE
        for side in ("chosen", "rejected"):
            expected, expected_ref = (truth(model, example, f"{side}_ids") for model in (policy, ref))
            assert row[f"{side}_logps"] == pytest.approx(expected, abs=2e-5)
            assert row[f"ref_{side}_logps"] == pytest.approx(expected_ref, abs=2e-5)
            assert row[f"{side}_rewards"] == pytest.approx(0.3 * (expected - expected_ref), abs=2e-5)
            assert row[f"{side}_tokens"] == len(example[f"{side}_ids"])
        assert row["margins"] == pytest.approx(row["chosen_rewards"] - row["rejected_rewards"], abs=1e-6)


def test_without_a_reference_there_are_no_rewards(models):
    rows = list(score_rows(tiny_pairs(3), models[0], **OPTIONS))
    assert all(set(row) == POLICY for row in rows)


@pytest.mark.parametrize("form", [list, Dataset.from_list])
def test_reference_columns_of_the_rows_are_used_unless_a_model_is_given(models, form):
    given = {"ref_chosen_logps": -5.0, "ref_rejected_logps": -7.5, "row": 41}
    examples = form([example | given for example in tiny_pairs(5)])
    for row in score_rows(examples, models[0], **OPTIONS):
        assert row["row"] == 41 and row["ref_rejected_logps"] == -7.5
        assert row["margins"] == pytest.approx(0.3 * (row["chosen_logps"] - row["rejected_logps"] - 2.5), abs=1e-5)
    (row, *_) = score_rows(examples, *models, **OPTIONS)
    assert row["ref_rejected_logps"] == pytest.approx(truth(models[1], tiny_pairs(5)[0], "rejected_ids"), abs=2e-5)


def test_under_peft_the_base_model_is_the_reference():
    policy = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    attach_logprob_head(policy)
    rows = list(score_rows(tiny_pairs(5), policy, **OPTIONS))
    base = list(score_rows(tiny_pairs(5), attach_logprob_head(tiny_model()), **OPTIONS))
    for row, plain in zip(rows, base, strict=True):
        assert row["ref_chosen_logps"] == pytest.approx(plain["chosen_logps"], abs=1e-5)
        assert abs(row["chosen_logps"] - plain["chosen_logps"]) > 1e-3


@pytest.mark.parametrize("ld_alpha", [None, 0.25])
@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"padded": True}])
def test_the_same_numbers_as_the_trainers(tmp_path, ld_alpha, options):
    policy, ref = tiny_model(), tiny_model()
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.5)
    args = {"beta": 0.3, "ld_alpha": ld_alpha, "report_to": "none", "use_cpu": True, **options}
    trainer = DPOTrainer(
        policy,
        ref_model=ref,
        args=DPOConfig(output_dir=str(tmp_path), **args),
        eval_dataset=tiny_dataset(23),
    )
    expected = trainer.evaluate()
    forward = OPTIONS | {
        "share": "none" if options.get("padded") else "prefix",
        "autocast": trainer.accelerator.autocast,
    }
    rows = list(score_rows(tiny_dataset(23), policy, ref, ld_alpha=ld_alpha, window=7, **forward))
    tolerance = 5e-3 if options.get("bf16") else 1e-5
    for side in ("chosen", "rejected"):
        for ours, theirs in (("logps", "logps"), ("rewards", "rewards"), ("tokens", "lengths")):
            mean = np.mean([row[f"{side}_{ours}"] for row in rows])
            assert mean == pytest.approx(expected[f"eval_{theirs}/{side}"], abs=tolerance)
    margins = [row["margins"] for row in rows]
    assert np.mean(margins) == pytest.approx(expected["eval_rewards/margins"], abs=tolerance)
    assert np.mean(np.array(margins) > 0) == pytest.approx(expected["eval_rewards/accuracies"])
    loss = np.logaddexp(0.0, -np.array(margins)).mean()
    assert loss == pytest.approx(expected["eval_loss"], abs=tolerance)


def test_it_streams_and_leaves_the_mode_alone(models):
    policy, taken = models[0].train(), []

    def endless():
        while True:
            for example in tiny_pairs(4):
                taken.append(example)
                yield example

    rows = score_rows(endless(), policy, window=3, **OPTIONS)
    assert taken == []
    next(rows)
    assert len(taken) == 3 and policy.training
    with torch.enable_grad():
        for _ in range(3):
            assert next(rows)
        assert torch.is_grad_enabled()
    assert len(taken) == 6
    rows.close()


def test_a_failing_model_is_left_in_its_mode(models, monkeypatch):
    models[0].train()
    monkeypatch.setattr(score, "pack", lambda *args, **options: [None])
    with pytest.raises(AttributeError):
        next(score_rows(tiny_pairs(2), models[0], **OPTIONS))
    assert models[0].training


def test_no_rows(models):
    assert list(score_rows([], models[0], **OPTIONS)) == []
    nothing = response_logps([], models[0], Forward(max_tokens=64, device=torch.device("cpu")))
    assert nothing.sums().shape == (0, 2) and nothing.lengths().shape == (0, 2)


@pytest.mark.parametrize("max_tokens", [1, 16, None])
def test_results_do_not_depend_on_the_cut(models, max_tokens):
    whole = list(score_rows(tiny_pairs(9), *models, **OPTIONS))
    cut = list(score_rows(tiny_pairs(9), *models, window=2, **OPTIONS | {"max_tokens": max_tokens}))
    for one, other in zip(whole, cut, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {"beta": 0.0}, "beta: expected a positive number, got 0.0"),
        ([], {"beta": float("nan")}, "beta: expected a positive number, got nan"),
        ([], {"window": 0}, "window: expected an integer in"),
        (tiny_pairs(1) + [{"prompt_ids": [1], "chosen_ids": [2]}], {}, r"examples\[1\]: rejected_ids missing"),
        (
            [tiny_pairs(1)[0] | {"ref_chosen_logps": 1.0}, tiny_pairs(1)[0]],
            {},
            "ref_chosen_logps: expected it in every row or in none, and of these 2 some lack it",
        ),
        (
            [tiny_pairs(1)[0] | {"ref_chosen_logps": 1.0}],
            {},
            "ref_rejected_logps: expected it beside ref_chosen_logps",
        ),
    ],
)
def test_refusals(models, rows, options, message):
    with pytest.raises(ValueError, match=message):
        list(score_rows(rows, models[0], **OPTIONS | options))


def test_autocast_surrounds_every_forward(models):
    entered = []

    @contextlib.contextmanager
    def autocast():
        entered.append(True)
        yield

    list(score_rows(tiny_pairs(4), *models, window=2, **OPTIONS | {"autocast": autocast, "max_tokens": None}))
    assert len(entered) == 4
