"""The methods of transformers' Trainer that are overridden or called, private ones too, as the installed one has them.

A changed signature would be found in training only, where a keyword is missing or an override is called no more.
"""

import inspect
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from transformers import Trainer

from dpofast import DPOTrainer

# DPOTrainer and its bases here.
OWNERS = [owner for owner in DPOTrainer.__mro__ if owner.__module__.startswith("dpofast.")]
# Every method of Trainer that one of them overrides, with Trainer's parameters; equal from 5.17 to 5.23.
OVERRIDDEN = {
    "__init__": None,  # by keyword: see test_the_constructor_takes_what_it_is_passed
    "_finalize_training": "trial, num_train_samples, start_time",
    "_inner_training_loop": "batch_size, args, resume_from_checkpoint, trial, ignore_keys_for_eval",
    "_issue_warnings_after_load": "load_result",
    "_load_best_model": "",
    "_load_callback_state": "",
    "_load_from_checkpoint": "resume_from_checkpoint, model",
    "_load_optimizer_and_scheduler": "checkpoint",
    "_load_rng_state": "checkpoint",
    "_maybe_log_save_evaluate": "tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, "
    "learning_rate",
    "_prepare_for_training": "max_steps, train_dataloader, resume_from_checkpoint",
    "_run_epoch": "model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, "
    "ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch",
    "_save": "output_dir, state_dict",
    "_save_checkpoint": "model, trial",
    "_save_optimizer_and_scheduler": "output_dir",
    "_sync_replicated_trainable_parameters": "model",  # 5.23 has it first, and tensor parallelism asks for it
    "_track_num_input_tokens": "inputs",
    "create_model_card": "language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, "
    "dataset_args",
    "create_optimizer": "model",
    "create_scheduler": "num_training_steps, optimizer",
    "evaluate": "eval_dataset, ignore_keys, metric_key_prefix",
    "evaluation_loop": "dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix",
    "floating_point_ops": "inputs",
    "get_batch_samples": "epoch_iterator, num_batches, device",
    "get_eval_dataloader": "eval_dataset",
    "get_test_dataloader": "test_dataset",
    "get_total_train_batch_size": "args",
    "get_train_dataloader": "",
    "log": "logs, start_time",
    "save_model": "output_dir, _internal_call",
    "train": "resume_from_checkpoint, trial, ignore_keys_for_eval",
    "training_step": "model, inputs, num_items_in_batch",
}
# Methods of Trainer that are called and not overridden.
CALLED = {
    "_get_output_dir": "trial",
    "_push_from_checkpoint": "checkpoint_folder",
    "_save_rng_state": "output_dir",
    "_save_scaler": "output_dir",
    "_wrap_model": "model, training, dataloader",
    "is_world_process_zero": "",
    "store_flos": "",
}
SOURCES = [Path(inspect.getfile(owner)).read_text("utf-8") for owner in OWNERS]


def parameters(name):
    return ", ".join(list(inspect.signature(getattr(Trainer, name)).parameters)[1:])


def test_every_override_is_listed():
    own = {name for owner in OWNERS for name, value in vars(owner).items() if callable(value)}
    assert {name for name in own if hasattr(Trainer, name)} == set(OVERRIDDEN)


@pytest.mark.parametrize("name", [*OVERRIDDEN, *CALLED])
def test_the_installed_trainer_has_the_parameters_that_are_expected(name):
    expected = {**OVERRIDDEN, **CALLED}[name]
    if expected is not None:
        assert parameters(name) == expected


@pytest.mark.parametrize("name", [name for name in OVERRIDDEN if name != "__init__"])
def test_an_override_takes_the_calls_of_trainer(name):
    theirs = inspect.signature(getattr(Trainer, name)).parameters
    for owner in OWNERS:
        if name in vars(owner):
            ours = inspect.signature(getattr(owner, name))
            if any(p.kind is p.VAR_KEYWORD for p in ours.parameters.values()) and len(ours.parameters) == 2:
                ours.bind(None, **dict.fromkeys(list(theirs)[1:]))  # Trainer passes keywords only
            else:
                ours.bind(*[None] * len(theirs))


def test_trainer_calls_an_epoch_by_keywords():
    source = inspect.getsource(Trainer._inner_training_loop)
    call = re.search(r"self\._run_epoch\((.*?)\n {12}\)", source, re.DOTALL)
    assert call is not None and all(re.match(r"\w+=", line.strip()) for line in call[1].split(",") if line.strip())


def test_the_constructor_takes_what_it_is_passed():
    passed = "model args data_collator train_dataset eval_dataset processing_class callbacks optimizers".split()
    assert set(passed) <= set(inspect.signature(Trainer.__init__).parameters)


@pytest.mark.parametrize("name", ["_tr_loss", "_globalstep_last_logged", "_total_loss_scalar", "_train_batch_size"])
def test_attributes_of_trainer_that_are_read_or_restored(name):
    assert any(f"self.{name}" in source for source in SOURCES)
    assert f"self.{name} = " in inspect.getsource(inspect.getmodule(Trainer))


def test_setup_allows_the_minor_versions_that_were_tested():
    setup = Path(__file__).resolve().parents[2].joinpath("setup.py").read_text("utf-8")
    requirement = Requirement(re.search(r'"(transformers[^"]*)"', setup)[1])
    allowed = [minor for minor in range(40) if requirement.specifier.contains(f"5.{minor}.0")]
    assert allowed == list(range(17, 24)) and not requirement.specifier.contains("6.0.0")
