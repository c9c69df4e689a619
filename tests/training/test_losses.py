"""DPOTrainer with every kind of loss: results do not depend on micro-batches, and each loss's requirements hold."""

import pytest
import torch
from datasets import Dataset

from dpofast import DataError, DPOConfig, reference
from dpofast.training.coupled import RunningRewards
from tests.support.tiny import tiny_dataset, tiny_model, tiny_pairs
from tests.support.tiny_training import losses_of, make_trainer, padded_training, weights_of

pytestmark = pytest.mark.slow(20)

SGD = {"optim": "sgd", "learning_rate": 0.05, "train_sampling_strategy": "sequential", "max_grad_norm": 0.0}
OPTIONS = {
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "ld": {"loss_type": "sigmoid", "ld_alpha": 0.3},
    "weighted": {"loss_type": "sigmoid", "use_weighting": True, "rpo_alpha": 0.5},
    "orpo": {"loss_type": "orpo"},
    "aot ld": {"loss_type": "aot_unpaired", "ld_alpha": 0.3},
    "kto weighted": {"loss_type": "kto_pair", "use_weighting": True},
    "bco": {"loss_type": "bco_pair", "bco_delta": "running_mean"},
    "beta_dpo": {"loss_type": "beta_dpo", "beta_dpo_threshold": 0.1},
    "lists": {"loss_type": ["plackett_luce", "nca"], "loss_weights": [1.0, 0.3]},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_results_do_not_depend_on_how_the_step_is_cut(tmp_path, name):
    results = []
    cuts = ({}, {"max_tokens": 24, "token_statistics": True}, {"max_tokens": 1, "precompute_ref_log_probs": False})
    for cut in cuts:
        data = {"train": tiny_dataset(8), "evaluation": tiny_dataset(5, seed=1)}
        trainer = make_trainer(tmp_path, **SGD, **OPTIONS[name], **cut, **data)
        trainer.train()
        results.append((losses_of(trainer), weights_of(trainer), trainer.evaluate()))
    for losses, weights, metrics in results[1:]:
        assert losses == pytest.approx(results[0][0], abs=1e-5)
        torch.testing.assert_close(weights, results[0][1], atol=1e-5, rtol=1e-5)
        for metric in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen"):
            assert metrics[metric] == pytest.approx(results[0][2][metric], abs=1e-4)


@pytest.mark.parametrize("name", ["mpo", "ld", "aot ld", "bco", "beta_dpo", "lists"])
def test_the_first_step_is_the_references(tmp_path, name):
    """Loss of four pairs, by reference.py over padded rows, with a reference that is not the policy."""
    ref_model = tiny_model()
    with torch.no_grad():
        ref_model.lm_head.weight.mul_(1.5)
    examples = tiny_pairs(4)
    trainer = make_trainer(
        tmp_path, **SGD, **OPTIONS[name], ref_model=ref_model, train=Dataset.from_list(examples), max_tokens=24
    )
    rows = [(e["prompt_ids"], e[side]) for e in examples for side in ("chosen_ids", "rejected_ids")]
    cu = torch.tensor([0, *torch.tensor([len(response) for _, response in rows]).cumsum(0)])
    with torch.no_grad():
        logps, ref = (
            reference.padded_logprobs(model, **reference.padded_rows(rows)) for model in (tiny_model(), ref_model)
        )
    options = {**OPTIONS[name]}
    kind, weights = options.pop("loss_type"), options.pop("loss_weights", None)
    pairs = torch.arange(8).view(-1, 2)
    expected = reference.preference_loss(logps, cu, pairs, ref, kind=kind, weights=weights, **options)
    trainer.train()
    assert losses_of(trainer) == pytest.approx([expected.item()], abs=1e-5)


def test_a_loss_without_reference_never_computes_one(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise AssertionError("a reference was computed")

    monkeypatch.setattr("dpofast.training.ref_model.add_reference_columns", refused)
    monkeypatch.setattr("dpofast.training.step.reference_logps", refused)
    for precompute in (True, False):
        trainer = make_trainer(tmp_path, loss_type="simpo", precompute_ref_log_probs=precompute)
        trainer.train()
        assert trainer.ref_model is None
        logged = trainer.state.log_history[0]
        assert logged["rewards/chosen"] == pytest.approx(0.1 * logged["logps/chosen"], rel=1e-5)
        assert "kl/chosen" not in logged and "displacement" not in logged
        assert "eval_rewards/margins" in trainer.evaluate(tiny_dataset(3, seed=5))
    with pytest.raises(ValueError, match="ref_model: loss_type 'simpo' has no reference; leave it out"):
        make_trainer(tmp_path, loss_type="simpo", ref_model=tiny_model())


def test_the_running_mean_is_resumed(tmp_path):
    options = {**SGD, **OPTIONS["bco"]}
    whole = make_trainer(tmp_path / "a", num_train_epochs=2, save_strategy="steps", save_steps=2, **options)
    whole.train()
    resumed = make_trainer(tmp_path / "b", num_train_epochs=2, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert torch.equal(weights_of(whole), weights_of(resumed))
    (callback,) = (c for c in resumed.callback_handler.callbacks if isinstance(c, RunningRewards))
    total, count = callback.tensor(torch.device("cpu")).tolist()
    assert count == 2 * 2 * 12 and total != 0


def test_reference_columns_with_ld_alpha_are_trls_weighted_sums(tmp_path):
    examples = [{**e, "ref_chosen_logps": -5.0 - i, "ref_rejected_logps": -50.0} for i, e in enumerate(tiny_pairs(4))]
    # The same response in two pairs of one prompt has another weighted sum in each.
    examples[1] = {**examples[1], "prompt_ids": examples[0]["prompt_ids"], "chosen_ids": examples[0]["chosen_ids"]}
    trainer = make_trainer(tmp_path, loss_type="sigmoid", ld_alpha=0.5, train=Dataset.from_list(examples))
    (batch,) = trainer._packer.pack(list(trainer.train_dataset), 1000)
    assert batch.ref_logps[:, 0].tolist() == [-5.0 - i for i in batch.pair_examples.tolist()]
    trainer.train()


def test_dpo_is_still_dpo(tmp_path):
    examples = tiny_pairs(8)
    trainer = make_trainer(
        tmp_path,
        train=Dataset.from_list(examples),
        train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
        weight_decay=0.0,
        loss_type=["sigmoid"],
        loss_weights=[1.0],
    )
    trainer.train()
    assert losses_of(trainer) == pytest.approx(padded_training(examples, 4)[0], abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": []}, "loss_type: expected one of"),
        ({"loss_type": ["sigmoid", "dpo"]}, r"loss_type: expected one of .* got \['sigmoid', 'dpo'\]"),
        ({"loss_type": "sigmoid", "loss_weights": [1.0, 2.0]}, "weights: expected 1 finite numbers"),
        ({"loss_type": "aot", "use_weighting": True}, "use_weighting=True: not for kind 'aot'"),
        ({"loss_type": "exo_pair"}, r"label_smoothing: expected a number in \(0, 1\) for kind 'exo_pair'"),
        ({"loss_type": "sft", "ld_alpha": 0.5}, "ld_alpha=0.5: not for kind 'sft'"),
    ],
)
def test_losses_that_do_not_exist(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)


def test_unpaired_data_is_refused(tmp_path):
    unpaired = Dataset.from_list([{"prompt": "3", "completion": "4", "label": True}])
    with pytest.raises(DataError, match=r"unpaired preferences \(KTO\) are not supported: column 'completion'"):
        make_trainer(tmp_path, train=unpaired)
