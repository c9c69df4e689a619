"""DPOTrainer: the batch-exact step against a plain padded loop, and what surrounds it."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from bench.cost import Cost
from dpofast import DataError, DPOConfig, DPOTrainer
from dpofast.evaluation.metrics import evaluation_metrics
from tests.support.families import family_model
from tests.support.tiny import VOCAB, tiny_dataset, tiny_model, tiny_pairs
from tests.support.tiny_training import losses_of, make_trainer, padded_training, weights_of

pytestmark = pytest.mark.slow(80)


@pytest.mark.parametrize("padded", [False, True])
def test_the_step_equals_a_plain_padded_loop(tmp_path, padded):
    examples = tiny_pairs(14)  # the last step has two pairs
    expected_losses, expected_weights = padded_training(examples, 4)
    trainer = make_trainer(
        tmp_path,
        train=Dataset.from_list(examples),
        train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
        weight_decay=0.0,
        padded=padded,
    )
    trainer.train()
    assert losses_of(trainer) == pytest.approx(expected_losses, abs=1e-5)
    torch.testing.assert_close(weights_of(trainer), expected_weights, atol=1e-5, rtol=1e-5)


def test_a_model_that_cannot_run_packed_trains_over_padded_rows(tmp_path):
    with pytest.raises(ValueError, match=r"BloomForCausalLM cannot run packed.*DPOConfig\(padded=True\), or --padded"):
        make_trainer(tmp_path, model=family_model("bloom"))
    trainer = make_trainer(tmp_path, model=family_model("bloom"), padded=True, num_train_epochs=8)
    assert all(batch.num_tokens <= 40 for batch in trainer._packer.pack(tiny_pairs(), 40))  # whole rows are counted
    trainer.train()
    losses = losses_of(trainer)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[-1] < losses[0]


def test_policy_equals_reference_at_step_0(tmp_path):
    trainer = make_trainer(tmp_path, evaluation=tiny_dataset(30, seed=1))
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics["eval_rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert first["rewards/accuracies"] <= 1


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 1},
        {"max_tokens": 24},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"precompute_ref_log_probs": False},
        {"max_logits_bytes": 97 * 4 * 3},
        {"token_statistics": True},
        {"gradient_checkpointing": True},
    ],
    ids=str,
)
def test_results_do_not_depend_on_how_the_step_is_cut(tmp_path, options):
    # Plain SGD: Adam divides a gradient that is all rounding by its own size.
    sgd = {"optim": "sgd", "learning_rate": 0.1}
    expected = make_trainer(tmp_path, **sgd)
    expected.train()
    trainer = make_trainer(tmp_path, **sgd, **options)
    trainer.train()
    assert losses_of(trainer) == pytest.approx(losses_of(expected), abs=1e-5)
    torch.testing.assert_close(weights_of(trainer), weights_of(expected), atol=1e-5, rtol=1e-5)


def test_a_reference_model_of_its_own(tmp_path):
    ref_model = tiny_model()
    with torch.no_grad():
        ref_model.lm_head.weight.mul_(1.5)
    runs = {}
    for precompute in (True, False):
        trainer = make_trainer(tmp_path, ref_model=copy.deepcopy(ref_model), precompute_ref_log_probs=precompute)
        trainer.train()
        runs[precompute] = losses_of(trainer)
        assert (trainer.ref_model is None) == precompute
    assert runs[True] == pytest.approx(runs[False], abs=1e-5)
    assert abs(runs[True][0] - math.log(2)) > 1e-3


@pytest.mark.parametrize("precompute", [True, False])
def test_lora_trains_only_its_adapter_against_the_base_model(tmp_path, precompute):
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = tiny_model()
    before = model.model.embed_tokens.weight.clone()
    trainer = make_trainer(
        tmp_path, model=model, peft_config=lora, precompute_ref_log_probs=precompute, num_train_epochs=4
    )
    trainer.train()
    losses = losses_of(trainer)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < losses[0]
    assert torch.equal(model.model.embed_tokens.weight, before)
    # After training the reference is still at hand: the model without its adapter.
    assert "eval_rewards/margins" in trainer.evaluate(tiny_dataset(5, seed=3))


@pytest.mark.parametrize("name", ["model", "ref_model"])
def test_what_is_no_model_of_transformers_is_refused_by_its_argument(tmp_path, name):
    with pytest.raises(ValueError, match=f"^{name}: expected a causal language model of transformers .*got Linear"):
        make_trainer(tmp_path, **{name: torch.nn.Linear(2, 2)})


def test_pairs_tie_in_the_first_step_and_padded_rows_avoid_no_padding_of_their_own(tmp_path):
    trainer = make_trainer(tmp_path, padded=True, max_steps=2)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    # policy and reference are one model, whose passes may differ in the last bit
    assert logged[0]["rewards/ties"] >= 0.5 and logged[0]["rewards/ties"] + logged[0]["rewards/accuracies"] <= 1
    assert logged[1]["rewards/ties"] == 0
    # all pairs of a step fit in one micro-batch, which is padded as a padded trainer would
    assert all(entry["padding_avoided"] == entry["sharing_avoided"] == 0 for entry in logged)


def test_metrics_add_up(tmp_path):
    trainer = make_trainer(
        tmp_path, token_statistics=True, share="prompt", evaluation=tiny_dataset(9, seed=1), num_train_epochs=2
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in logged:
        margin = entry["rewards/chosen"] - entry["rewards/rejected"]
        assert entry["rewards/margins"] == pytest.approx(margin, abs=1e-6)
        assert 0 < entry["entropy"] <= math.log(97) + 1e-6
        assert 0 <= entry["mean_token_accuracy"] <= 1
        assert 0 <= entry["padding_avoided"] < 1 and 0 < entry["sharing_avoided"] < 1
        assert entry["tokens_per_second"] > 0 and entry["truncated"] == 0
    tokens = sum(len(e["prompt_ids"]) + len(e["chosen_ids"]) + len(e["rejected_ids"]) - 2 for e in tiny_pairs())
    assert logged[-1]["num_tokens"] == 2 * tokens
    evaluated = trainer.evaluate()
    assert evaluated["eval_rewards/accuracies"] * 9 == pytest.approx(round(evaluated["eval_rewards/accuracies"] * 9))
    assert trainer.state.total_flos > 0


@pytest.mark.parametrize("options", [{}, {"token_statistics": True}, {"loss_type": "simpo"}], ids=str)
def test_the_names_of_an_evaluations_metrics_are_known_beforehand(tmp_path, options):
    trainer = make_trainer(tmp_path, evaluation=tiny_dataset(9, seed=1), **options)
    metrics = {name.removeprefix("eval_") for name in trainer.evaluate()}
    known = evaluation_metrics(
        with_reference="loss_type" not in options, token_statistics="token_statistics" in options
    )
    timing = {"runtime", "samples_per_second", "steps_per_second", "epoch"}
    assert metrics - timing - {"length/margin_correlation", "length/longer_preferred"} == {
        name for name in known if name not in ("length/margin_correlation", "length/longer_preferred")
    }


@pytest.mark.parametrize("name", ["accuracy", "eval_rewards/accuracy", "eval_c_loss"])
def test_an_unknown_best_metric_is_refused_before_training(tmp_path, name):
    sets = {"a": tiny_dataset(3, seed=1), "b": tiny_dataset(4, seed=2)}
    options = {"metric_for_best_model": name, "eval_strategy": "epoch"}
    with pytest.raises(ValueError, match="metric_for_best_model: expected one of displacement, .*rewards/accuracies"):
        make_trainer(tmp_path, evaluation=sets, **options)
    make_trainer(tmp_path, evaluation=sets, **{**options, "metric_for_best_model": "eval_b_rewards/accuracies"})


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_models_config_keeps_its_use_cache(tmp_path, use_cache):
    trainer = make_trainer(tmp_path, model=tiny_model(use_cache=use_cache), gradient_checkpointing=True, max_steps=1)
    trainer.train()
    assert trainer.model.config.use_cache is use_cache


def test_several_eval_datasets(tmp_path):
    trainer = make_trainer(
        tmp_path, evaluation={"a": tiny_dataset(3, seed=1), "b": tiny_dataset(4, seed=2)}, eval_on_start=True
    )
    trainer.train()
    names = {name for entry in trainer.state.log_history for name in entry}
    assert {"eval_a_rewards/margins", "eval_b_rewards/margins"} <= names


def test_training_learns_and_the_saved_model_loads(tmp_path):
    trainer = make_trainer(tmp_path, num_train_epochs=15)
    trainer.train()
    assert losses_of(trainer)[-1] < 0.5 * math.log(2)
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(loaded(ids).logits, trainer.model(ids).logits)


def test_resume_gives_the_same_weights(tmp_path):
    whole = make_trainer(tmp_path / "a", num_train_epochs=2, save_strategy="steps", save_steps=2)
    whole.train()
    resumed = make_trainer(tmp_path / "b", num_train_epochs=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert torch.equal(weights_of(whole), weights_of(resumed))


def test_a_loss_that_is_not_finite_stops_with_its_rows(tmp_path):
    trainer = make_trainer(tmp_path, train_sampling_strategy="sequential", num_train_epochs=2)
    with torch.no_grad():  # a token of the fourth pair only
        (token,) = set(tiny_pairs()[3]["chosen_ids"][:1])
        trainer.model.lm_head.weight[token] = float("nan")
    with pytest.raises(
        FloatingPointError, match=r"train data: the loss of the pairs in rows \[0, 1, 2, 3\] is not finite at step 1"
    ):
        trainer.train()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=1)
    step = trainer.create_optimizer().step

    def spoil(*args, **kwargs):
        step(*args, **kwargs)
        if trainer.state.global_step == 1:
            with torch.no_grad():
                next(trainer.model.parameters()).view(-1)[0] = float("nan")

    trainer.optimizer.step = spoil
    with pytest.raises(ValueError, match=r"is not finite after step 2, and nothing was saved; .*checkpoint-1 is"):
        trainer.train()
    assert not (tmp_path / "checkpoint-2").exists()
    with pytest.raises(ValueError, match="is not finite after step 2"):
        trainer.save_model()
    assert not (tmp_path / "model.safetensors").exists()


def test_without_an_accelerator_a_run_is_the_cpus_and_a_process_group_must_be_known(tmp_path, monkeypatch):
    args = DPOConfig(output_dir=str(tmp_path), report_to="none")
    assert args.use_cpu or torch.accelerator.is_available()
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group=None: 2)
    with pytest.raises(ValueError, match="expected 2 processes that train together, .* made for one"):
        make_trainer(tmp_path)


def test_bad_rows_are_refused_or_counted(tmp_path):
    examples = tiny_pairs(4)
    examples[2]["chosen_ids"] = examples[2]["rejected_ids"]
    with pytest.raises(DataError, match="train data.*row 2"):
        make_trainer(tmp_path, train=Dataset.from_list(examples))
    trainer = make_trainer(tmp_path, train=Dataset.from_list(examples), on_bad_row="skip")
    assert len(trainer.train_dataset) == 3
    assert "1" in trainer.data_reports["train"].summary()
    trainer.train()


def test_reference_columns_in_the_data_are_used(tmp_path):
    examples = [{**e, "ref_chosen_logps": -5.0, "ref_rejected_logps": -50.0} for e in tiny_pairs(4)]
    trainer = make_trainer(tmp_path, train=Dataset.from_list(examples))
    trainer.train()
    assert trainer.state.log_history[0]["rewards/rejected"] > trainer.state.log_history[0]["rewards/chosen"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta: expected a positive"),
        ({"loss_type": "sigmod"}, "loss_type: expected one of"),
        ({"label_smoothing": 0.7}, "label_smoothing"),
        ({"max_tokens": 0}, "max_tokens: expected at least 1, or 'auto', got 0"),
        ({"on_bad_row": "ignore"}, "on_bad_row: expected 'raise' or 'skip'"),
        ({"truncation_mode": "middle"}, "truncation_mode: expected 'keep_start' or 'keep_end'"),
        ({"list_pairs": "best"}, "list_pairs: expected one of .*, got 'best'"),
        ({"min_score_gap": 1.0}, "min_score_gap: 1.0 is the least gap of the pairs that list_pairs makes"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: expected at least 1"),
        ({"max_length": 1}, "max_length: expected room"),
        ({"learning_rate": -1.0}, "learning_rate: expected 0 or more"),
        ({"learning_rate": float("nan")}, "learning_rate: expected 0 or more"),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 100}, "fewer than the 100 of a step"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: not supported here: not used by DPO"),
        ({"max_logits_bytes": 100}, "max_logits_bytes: expected at least one row"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options)


def test_bad_models_and_datasets(tmp_path):
    model = tiny_model()
    with pytest.raises(ValueError, match="ref_model: expected another model"):
        make_trainer(tmp_path, model=model, ref_model=model)
    with pytest.raises(ValueError, match="train_dataset: expected a datasets.Dataset, got list"):
        make_trainer(tmp_path, train=tiny_pairs())
    trainer = make_trainer(tmp_path)
    trainer.train()
    with pytest.raises(ValueError, match="reference model, which is gone"):
        trainer.evaluate(tiny_dataset(3, seed=5))


@pytest.mark.parametrize("precompute", [True, False])
def test_under_bf16_autocast_the_reference_takes_the_policys_path(tmp_path, precompute):
    trainer = make_trainer(tmp_path, bf16=True, precompute_ref_log_probs=precompute)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-5)


def test_token_ids_need_no_tokenizer(tmp_path):
    args = DPOConfig(output_dir=str(tmp_path), max_steps=1, save_strategy="no", report_to="none", use_cpu=True)
    DPOTrainer(tiny_model(), args=args, train_dataset=tiny_dataset()).train()


def test_no_tokenizer_is_made_up_for_a_folder_without_one(tmp_path):
    tiny_model(eos_token_id=7, pad_token_id=8).save_pretrained(tmp_path / "model")
    args = DPOConfig(output_dir=str(tmp_path / "run"), max_steps=1, save_strategy="no", report_to="none", use_cpu=True)
    trainer = DPOTrainer(str(tmp_path / "model"), args=args, train_dataset=tiny_dataset())
    assert trainer.processing_class is None
    trainer.train()
    trainer.save_model()
    assert not list((tmp_path / "run").glob("*token*"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert (saved.config.eos_token_id, saved.config.pad_token_id) == (7, 8)


@pytest.mark.parametrize(("adapter", "units"), [(True, 2.0), (False, 3.0)])
def test_a_frozen_head_takes_two_products_and_a_trained_one_three(tmp_path, adapter, units):
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if adapter else None
    trainer = make_trainer(tmp_path, peft_config=lora)
    step = next(iter(trainer.get_train_dataloader()))
    with Cost() as cost:
        trainer.training_step(trainer.model, step)
    targets = sum(len(example["chosen_ids"]) + len(example["rejected_ids"]) for example in step)
    head = sum(2 * math.prod(shape) * count for shape, count in cost.gemms.items() if VOCAB in shape)
    assert head == units * 2 * targets * 32 * VOCAB


@pytest.mark.parametrize("max_tokens", [24, 4096])
def test_predictions_are_rewards_in_the_datasets_order(tmp_path, max_tokens):
    data, ref = tiny_dataset(12), tiny_model(rms_norm_eps=0.1)
    options = {"max_tokens": max_tokens, "beta": 0.5, "precompute_ref_log_probs": False}
    trainer = make_trainer(tmp_path, model=tiny_model(), ref_model=ref, **options)
    rewards = trainer.predict(data).predictions
    for row, (chosen, rejected) in zip(data, rewards, strict=True):
        for side, ours in (("chosen_ids", chosen), ("rejected_ids", rejected)):
            ids = torch.tensor([row["prompt_ids"] + row[side]])
            with torch.no_grad():
                policy, reference = (
                    model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
                    for model in (tiny_model(), tiny_model(rms_norm_eps=0.1))
                )
            expected = 0.5 * float((policy - reference)[len(row["prompt_ids"]) - 1 :].sum())
            assert ours == pytest.approx(expected, abs=1e-5)
