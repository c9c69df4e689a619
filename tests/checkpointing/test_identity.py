"""A checkpoint is resumed by the run that wrote it: another configuration, data set, model or tokenizer is refused."""

import logging

import pytest
import torch
from datasets import Dataset

from dpofast.checkpointing.folder import read_manifest
from dpofast.checkpointing.identity import check_same_run
from tests.support import tiny_training
from tests.support.tiny import tiny_dataset, tiny_model, tiny_pairs, tiny_tokenizer
from tests.support.tiny_training import SAVING, make_trainer, weights_of

pytestmark = pytest.mark.slow(30)


def one_token_changed():
    examples = tiny_pairs()
    examples[5]["chosen_ids"] = [*examples[5]["chosen_ids"][:-1], 50]
    return Dataset.from_list(examples)


def scaled_model():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1.01)
    return model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 7}, "seed was 42, is 7"),
        ({"per_device_train_batch_size": 3}, "examples per step was 4, is 3"),
        ({"gradient_accumulation_steps": 2}, "examples per step was 4, is 8"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy was random, is sequential"),
        ({"learning_rate": 0.5, "weight_decay": 0.1}, "learning_rate was 0.01, is 0.5; weight_decay was 0.0, is 0.1"),
        ({"beta": 0.2}, "beta was 0.1, is 0.2"),
        ({"loss_type": "ipo"}, "loss_type was sigmoid, is ipo"),
        ({"loss_type": ["sigmoid", "ipo"]}, r"loss_type was sigmoid, is \['sigmoid', 'ipo'\]"),
        ({"bf16": True}, "bf16 was False, is True"),
        (
            {"train": one_token_changed()},
            r"train_dataset was 12 rows with checksum \w+, is 12 rows with checksum \w+\. The data, or the way it",
        ),
        ({"train": tiny_dataset(13)}, r"train_dataset was 12 rows with checksum \w+, is 13 rows"),
        ({"model": scaled_model()}, r"reference weights was \w+, is \w+\. The model that a run begins from is its ref"),
        ({"model": tiny_model("llama-tied")}, "trainable parameters: lm_head.weight was float32 97×32, is not trained"),
        ({"model": tiny_model(num_hidden_layers=2)}, r"trainable parameters: model.layers.2.*, and \d+ more"),
    ],
    ids=str,
)
def test_another_run_is_refused(run, options, message):
    trainer = make_trainer(run, **{**SAVING, **options})
    before = weights_of(trainer)
    with pytest.raises(ValueError, match=rf"\S+checkpoint-6 was written by another run: .*{message}.*Go on with what"):
        trainer.train(resume_from_checkpoint="latest")
    assert torch.equal(weights_of(trainer), before)


def test_other_held_out_pairs_are_refused_even_after_a_part_without_any(tmp_path):
    options = {**SAVING, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    make_trainer(tmp_path, evaluation=tiny_dataset(4, seed=1), **options).train()
    make_trainer(tmp_path, **{**SAVING, "num_train_epochs": 3}).train(resume_from_checkpoint="latest")
    message = r"eval_dataset was 4 rows with checksum \w+, is a: 5 rows with checksum \w+\. A run's evaluations"
    with pytest.raises(ValueError, match=message):
        trainer = make_trainer(
            tmp_path, evaluation={"a": tiny_dataset(5, seed=1)}, **options, metric_for_best_model="a_loss"
        )
        trainer.train(resume_from_checkpoint="latest")


def test_a_tied_weight_is_not_called_missing(tmp_path, caplog):
    make_trainer(tmp_path, model=tiny_model("llama-tied"), **SAVING).train()
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    resumed = make_trainer(tmp_path, model=tiny_model("llama-tied"), **SAVING)
    resumed.train(resume_from_checkpoint="latest")
    logger.removeHandler(caplog.handler)
    assert "missing" not in caplog.text


def test_another_tokenizer_is_refused(run, monkeypatch):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["new"])
    monkeypatch.setattr(tiny_training, "tiny_tokenizer", lambda: tokenizer)
    message = (
        r"tokenizer was 97 tokens with checksum \w+, is 98 tokens with checksum \w+\. Pass the tokenizer that the run"
    )
    with pytest.raises(ValueError, match=message):
        make_trainer(run, **SAVING).train(resume_from_checkpoint="latest")


def test_an_adapter_on_another_base_model_is_refused(tmp_path):
    from peft import LoraConfig

    def lora(model, rank=2):
        config = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
        return make_trainer(tmp_path, model=model, peft_config=config, **SAVING)

    lora(tiny_model()).train()
    lora(tiny_model()).train(resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match=r"frozen weights was \w+, is \w+\. The checkpoint has only what is trained"):
        lora(scaled_model()).train(resume_from_checkpoint="latest")
    with pytest.raises(
        ValueError, match="trainable parameters: .*lora_A.default.weight was float32 2×32, is float32 4×32"
    ):
        lora(tiny_model(), rank=4).train(resume_from_checkpoint="latest")


def test_the_same_data_in_another_file_is_the_same_run(run, tmp_path):
    path = tmp_path / "pairs.parquet"
    tiny_dataset().to_parquet(path)
    same = Dataset.from_parquet(str(path)).select(range(12))
    make_trainer(run, train=same, **SAVING).train(resume_from_checkpoint="latest")


def test_a_longer_run_is_said(run):
    trainer = make_trainer(run, **{**SAVING, "num_train_epochs": 3})
    message = "as a run of another length: num_train_epochs was 2, is 3. From here the learning rate follows"
    with pytest.warns(UserWarning, match=message):
        trainer.train(resume_from_checkpoint="latest")
    assert trainer.state.global_step == 9


def test_other_pairs_per_step_are_refused_with_what_keeps_them(run):
    message = (
        "examples per step was 4, is 8. For 4 examples a step on 1 ranks set per_device_train_batch_size and "
        "gradient_accumulation_steps to 4 and 1 or 2 and 2 or 1 and 4"
    )
    with pytest.raises(ValueError, match=message):
        make_trainer(run, **{**SAVING, "gradient_accumulation_steps": 2}).train(resume_from_checkpoint="latest")
    identity = {"examples per step": 4}
    with pytest.raises(
        ValueError, match="Steps of 4 examples cannot be divided evenly among 3 ranks: start one of 1, 2"
    ):
        check_same_run(identity, {"examples per step": 3}, run, 3)


def test_another_number_of_processes_under_deepspeed_is_refused(run, monkeypatch):
    manifest = read_manifest(run / "checkpoint-6")
    monkeypatch.setattr("dpofast.checkpointing.trainer.read_manifest", lambda _: {**manifest, "world_size": 2})
    trainer = make_trainer(run, **SAVING)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="was written by 2 processes under DeepSpeed.*and these are 1: start as many"):
        trainer._prepare(str(run / "checkpoint-6"))
