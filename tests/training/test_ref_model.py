"""Which model is the reference: a PEFT model's own adapter, and one that follows the policy."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.support.tiny import tiny_dataset, tiny_model
from tests.support.tiny_training import losses_of, make_trainer, weights_of

pytestmark = pytest.mark.slow(10)

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)


@pytest.mark.parametrize("precompute", [True, False])
def test_the_adapter_that_a_model_comes_with_is_its_own_reference(tmp_path, precompute):
    torch.manual_seed(1)
    model = get_peft_model(tiny_model(), LORA)
    trainer = make_trainer(tmp_path, model=model, precompute_ref_log_probs=precompute)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".dpofast_reference." in name}
    trainer.train()
    losses = losses_of(trainer)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[-1] < losses[0]
    assert bool(before) == (not precompute)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".default." in name)
        if name in before:
            assert torch.equal(before[name], parameter)


def test_both_ways_to_it_agree(tmp_path):
    runs = []
    for precompute in (True, False):
        torch.manual_seed(1)
        trainer = make_trainer(tmp_path, model=get_peft_model(tiny_model(), LORA), precompute_ref_log_probs=precompute)
        trainer.train()
        runs.append(losses_of(trainer))
    assert runs[0] == pytest.approx(runs[1], abs=1e-5)


def test_a_reference_that_follows_the_policy(tmp_path):
    options = {"precompute_ref_log_probs": False, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    moving = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.25, "ref_model_sync_steps": 2}
    trainer = make_trainer(tmp_path, train=tiny_dataset(12), **options, **moving)
    start = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()  # three steps, so one update, after the second

    # the same by hand: two steps against the start, one against the mixture
    first = make_trainer(tmp_path, train=tiny_dataset(12), max_steps=2, **options)
    first.train()
    mixed = tiny_model()
    for parameter, old, new in zip(mixed.parameters(), start, first.model.parameters(), strict=True):
        parameter.data = 0.75 * old + 0.25 * new.detach()
    for ours, expected in zip(trainer.ref_model.parameters(), mixed.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)
    assert not torch.equal(weights_of(trainer), weights_of(first))


def test_a_resumed_run_goes_on_with_the_reference_as_it_was(tmp_path):
    options = {"precompute_ref_log_probs": False, "sync_ref_model": True, "ref_model_sync_steps": 1}
    options |= {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 4}
    whole = make_trainer(tmp_path / "run", train=tiny_dataset(12), **options)
    whole.train()
    resumed = make_trainer(tmp_path / "run", train=tiny_dataset(12), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert torch.equal(weights_of(whole), weights_of(resumed))
    for ours, expected in zip(resumed.ref_model.parameters(), whole.ref_model.parameters(), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"precompute_ref_log_probs": True},
            "sync_ref_model: a reference that moves cannot be computed before training",
        ),
        ({"precompute_ref_log_probs": False, "ref_model_mixup_alpha": 0.0}, "ref_model_mixup_alpha: expected in"),
        ({"precompute_ref_log_probs": False, "ref_model_sync_steps": 0}, "ref_model_sync_steps: expected at least 1"),
        ({"precompute_ref_log_probs": False, "loss_type": "simpo"}, "sync_ref_model: loss_type .*has no reference"),
        ({"precompute_ref_log_probs": False, "peft": True}, "sync_ref_model: .*adapter"),
    ],
)
def test_bad_moving_references(tmp_path, options, message):
    options = {"sync_ref_model": True, **copy.copy(options)}
    peft_config = LORA if options.pop("peft", False) else None
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, peft_config=peft_config, **options)


def with_columns(dataset):
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        dataset = dataset.add_column(name, [-5.0] * len(dataset))
    return dataset


def test_a_ref_model_beside_reference_log_probs_in_the_data(tmp_path):
    train, held_out = with_columns(tiny_dataset(8)), tiny_dataset(4, seed=5)
    for evaluation in (None, with_columns(held_out), {"a": with_columns(held_out)}):
        for options in ({}, {"precompute_ref_log_probs": False}):
            with pytest.raises(ValueError, match="ref_model: the data .train_dataset.* bring ref_chosen_logps"):
                make_trainer(tmp_path, train=train, evaluation=evaluation, ref_model=tiny_model(), **options)
    with pytest.warns(UserWarning, match="ref_model: train_dataset brings ref_chosen_logps and .* other datasets only"):
        trainer = make_trainer(tmp_path, train=train, evaluation=held_out, ref_model=tiny_model())
    assert set(trainer.train_dataset["ref_chosen_logps"]) == {-5.0}
    assert -5.0 not in trainer.eval_dataset["ref_chosen_logps"][:]
    with pytest.raises(ValueError, match="sync_ref_model: the training data bring ref_chosen_logps"):
        make_trainer(tmp_path, train=train, sync_ref_model=True)


def test_further_data_after_the_reference_was_freed(tmp_path):
    trainer = make_trainer(tmp_path, ref_model=tiny_model())
    with pytest.raises(ValueError, match="predict.. now .test.*a ref_model since the constructor has the log-probs"):
        trainer.predict(tiny_dataset(4, seed=5))
    live = make_trainer(tmp_path, ref_model=tiny_model(), precompute_ref_log_probs=False)
    assert live.predict(tiny_dataset(4, seed=5)).metrics["test_loss"] == pytest.approx(math.log(2), abs=1e-5)
