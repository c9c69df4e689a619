"""Every option of TrainingArguments is read or refused; methods and arguments that would be ignored are refused."""

import inspect
import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import trl
from datasets import Dataset, IterableDataset
from transformers import Trainer, TrainingArguments

import dpofast
from dpofast import DPOConfig, DPOTrainer
from dpofast.checkpointing.trainer import CheckpointedTrainer
from dpofast.training import config
from dpofast.training.checks.arguments import as_dpo_config
from dpofast.training.checks.device import device_notes
from dpofast.training.checks.methods import NOT_CALLED
from dpofast.training.checks.options import MOOT, OF_TRL, UNREAD, check_options
from tests.support.tiny import save_tiny, tiny_dataset, tiny_model, tiny_pairs, tiny_tokenizer
from tests.support.tiny_training import losses_of, make_trainer

pytestmark = pytest.mark.slow(15)

# Values that are not the default, for options whose type does not say one.
OTHER = {
    "label_smoothing_factor": 0.1,
    "torch_empty_cache_steps": 4,
    "include_for_metrics": ["inputs"],
    "label_names": ["labels"],
    "length_column_name": "size",
}
ALIASES = {"gradient_checkpointing_kwargs": "activation_checkpointing_kwargs"}  # of transformers' own, copied there
OPTIONS = {f.name: f for f in fields(TrainingArguments)}


def sources():
    """What reads options: our packages, and transformers without the methods of Trainer that are never called."""
    text = "".join(path.read_text("utf-8") for path in Path(dpofast.__file__).parent.rglob("*.py"))
    ours = inspect.getsource(CheckpointedTrainer) + inspect.getsource(DPOTrainer)
    overrides = {name: part for owner in (CheckpointedTrainer, DPOTrainer) for name, part in vars(owner).items()}
    for name, method in vars(Trainer).items():
        if not inspect.isfunction(method) or name in NOT_CALLED:
            continue
        if name not in overrides or f"super().{name}(" in ours:
            text += inspect.getsource(method)
    root = Path(transformers.__file__).parent
    for name in ("training_args", "trainer_callback", "trainer_optimizer", "trainer_utils", "trainer_pt_utils"):
        text += (root / f"{name}.py").read_text("utf-8") if (root / f"{name}.py").is_file() else ""
    return text + (root / "integrations" / "integration_utils.py").read_text("utf-8")


def test_every_option_of_trainer_is_read_or_refused_or_moot():
    text = sources()
    listed = set(UNREAD) | set(MOOT)
    assert not set(UNREAD) & set(MOOT)
    unknown = [
        name
        for name in OPTIONS
        if name not in listed and not re.search(rf"(args|self|arguments)\.({name}|{ALIASES.get(name, name)})\b", text)
    ]
    assert unknown == []


@pytest.mark.parametrize("name", [name for name in UNREAD if name in OPTIONS])
def test_an_option_that_no_step_reads_is_refused_by_name(tmp_path, name):
    other = OTHER.get(name, not OPTIONS[name].default)  # a switch, whose default may be None
    with pytest.raises(ValueError, match=f"{name}: not supported here: "):
        DPOConfig(output_dir=str(tmp_path), **{name: other})


def test_options_of_accelerates_own_loader_are_refused(tmp_path):
    with pytest.raises(ValueError, match="accelerator_config: split_batches: not supported here"):
        DPOConfig(output_dir=str(tmp_path), accelerator_config={"split_batches": True})


@pytest.mark.parametrize("given", ["zero3.json", {"zero_optimization": {"stage": 3}}])
def test_deepspeed_that_is_not_installed_is_named(given, tmp_path, monkeypatch):
    monkeypatch.setattr(config, "is_deepspeed_available", lambda: False)
    with pytest.raises(ValueError, match="deepspeed: expected its package.* pip install deepspeed; FSDP2"):
        DPOConfig(output_dir=str(tmp_path), deepspeed=given)


@pytest.mark.parametrize("name", ["cp_size", "sp_size", "dp_replicate_size"])
def test_parallelism_config_divides_layers_alone(tmp_path, name):
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True)
    args.parallelism_config = SimpleNamespace(**{name: 2})
    with pytest.raises(ValueError, match=f"parallelism_config: {name}: not supported here"):
        check_options(args)


def test_every_field_of_trls_config_is_taken_or_refused_by_name(tmp_path):
    ours = {f.name for f in fields(DPOConfig)}
    assert [f.name for f in fields(trl.DPOConfig) if f.name not in ours] == []
    others = {"pad_to_multiple_of": 8, "precompute_ref_batch_size": 4, "pad_token": "x"}
    assert others.keys() == OF_TRL.keys()
    for name, value in others.items():
        with pytest.raises(ValueError, match=f"{name}: expected .*, got {value!r}: "):
            DPOConfig(output_dir=str(tmp_path), **{name: value})
    DPOConfig(output_dir=str(tmp_path), padding_free=True)
    DPOConfig(output_dir=str(tmp_path), activation_offloading=True, gradient_checkpointing=True)
    with pytest.raises(ValueError, match="leave out either padding_free or padded"):
        DPOConfig(output_dir=str(tmp_path), padding_free=True, padded=True)


def test_trls_own_config_trains_as_ours_with_the_same_options(tmp_path):
    options = {
        **{"output_dir": str(tmp_path), "beta": 0.3, "loss_type": ["ipo"], "learning_rate": 1e-2, "max_steps": 3},
        **{"per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", "report_to": "none"},
        **{"use_cpu": True, "bf16": False, "gradient_checkpointing": True, "precompute_ref_log_probs": False},
    }
    runs = []
    for config_class in (trl.DPOConfig, DPOConfig):
        args = config_class(**options)
        trainer = DPOTrainer(
            tiny_model(), None, args, None, tiny_dataset(), None, tiny_tokenizer()
        )  # TRL's order of arguments
        trainer.train()
        runs.append(losses_of(trainer))
    assert runs[0] == runs[1] and runs[0][0] != runs[0][-1]
    for other in (TrainingArguments, trl.KTOConfig):
        name = f"{other.__module__.split('.')[0]}.{other.__name__}"
        with pytest.raises(ValueError, match=f"args: expected a dpofast.DPOConfig, got {name}"):
            as_dpo_config(other(output_dir=str(tmp_path), use_cpu=True))


def test_arguments_of_trls_trainer_are_all_known(tmp_path):
    theirs = list(inspect.signature(trl.DPOTrainer.__init__).parameters)
    assert list(inspect.signature(DPOTrainer.__init__).parameters) == theirs
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    cases = [
        ({"data_collator": tiny_dataset()}, "data_collator: expected None.*got Dataset: pass train_dataset"),
        ({"compute_metrics": print}, "compute_metrics: expected None.*trainer.pair_records"),
        ({"processing_class": args}, "processing_class: expected a tokenizer, a processor or None, got DPOConfig"),
        ({"peft_config": tiny_tokenizer()}, "peft_config: expected a config of peft"),
        ({"quantization_config": {}}, "quantization_config: the model is loaded already"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            DPOTrainer(tiny_model(), args=args, **options)
    args.model_init_kwargs = {"dtype": torch.bfloat16}
    with pytest.raises(ValueError, match="model_init_kwargs: the model is loaded already"):
        DPOTrainer(tiny_model(), args=args)


def test_models_by_name_are_loaded_by_model_init_kwargs(tmp_path):
    folder = str(save_tiny(tmp_path / "model"))
    options = {"use_cpu": True, "report_to": "none", "max_steps": 1, "save_strategy": "no"}
    args = DPOConfig(str(tmp_path / "run"), model_init_kwargs={"dtype": "bfloat16"}, **options)
    trainer = DPOTrainer(folder, args=args, train_dataset=tiny_dataset(), ref_model=folder)
    assert trainer.model.dtype == torch.bfloat16 and len(trainer.processing_class) == len(tiny_tokenizer())
    trainer.train()
    assert DPOTrainer(folder, args=DPOConfig(str(tmp_path / "run"), **options)).model.dtype == torch.float32


@pytest.mark.parametrize("name", ["compute_loss", "prediction_step", "_get_train_sampler", "dpo_loss", "tokenize_row"])
def test_a_subclass_whose_method_would_not_be_called_is_refused(tmp_path, name):
    cls = type("Mine", (DPOTrainer,), {name: lambda self, *args, **kwargs: None})
    with pytest.raises(ValueError, match=rf"Mine\.{name} would not be called: "):
        cls(tiny_model(), args=DPOConfig(str(tmp_path), use_cpu=True), train_dataset=tiny_dataset())
    kept = type("Mine", (DPOTrainer,), {"log": lambda self, *args, **kwargs: None})
    kept(tiny_model(), args=DPOConfig(str(tmp_path), use_cpu=True, report_to="none"))


def test_methods_that_are_named_as_not_called_are_trainers_or_trls():
    known = {name for cls in (Trainer, trl.DPOTrainer) for name in dir(cls)}
    earlier = {"dpo_loss", "concatenated_forward", "concatenated_inputs", "get_batch_loss_metrics", "tokenize_row"}
    assert {"compute_loss", "prediction_step", "_compute_loss", "_prepare_dataset"} <= known & set(NOT_CALLED)
    assert earlier <= set(NOT_CALLED)


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        ({}, {}, True),
        ({"fp16": True}, {}, False),
        ({"deepspeed": "config.json"}, {}, False),
        ({"use_cpu": True}, {}, False),
        ({}, {"ACCELERATE_MIXED_PRECISION": "no"}, False),
    ],
    ids=str,
)
def test_a_gpu_that_has_bfloat16_computes_in_it_unless_told(monkeypatch, options, environment, expected):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: not including_emulation)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    args = SimpleNamespace(**{"fp16": False, "deepspeed": None, "use_cpu": False, **options})
    assert config._chooses_bf16(args) is expected
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: False)
    assert config._chooses_bf16(args) is False


@pytest.mark.parametrize(
    ("dtype", "where", "options", "said"),
    [
        (torch.float32, "cuda", {}, True),
        (torch.float32, "cuda", {"bf16": True}, False),
        (torch.float32, "cuda", {"fp16": True}, False),
        (torch.bfloat16, "cuda", {}, False),
        (torch.float32, "cpu", {}, False),
    ],
)
def test_what_float32_costs_on_a_gpu_is_said(dtype, where, options, said):
    off = dict.fromkeys(("chose_bf16", "bf16", "fp16", "deepspeed", "fsdp"), False)
    args = SimpleNamespace(**{**off, "device": torch.device(where), **options})
    notes = device_notes(args, tiny_model(dtype=dtype), None)
    assert len(notes) == said and all("tensor cores" in note and "bf16=True" in note for note in notes)


def test_the_choice_of_bfloat16_is_said_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(config, "_chooses_bf16", lambda args: True)
    trainer = make_trainer(tmp_path)
    assert trainer.args.bf16 is True
    assert capsys.readouterr().err.count("dpofast: mixed precision in bfloat16") == 1
    make_trainer(tmp_path, bf16=True)
    assert "mixed precision" not in capsys.readouterr().err
    assert make_trainer(tmp_path, bf16=False).args.bf16 is False


def stream(examples):
    return IterableDataset.from_generator(lambda: iter(examples))


def test_a_stream_trains_as_the_same_rows_in_their_order(tmp_path):
    examples = tiny_pairs(14)
    options = {"max_steps": 6, "precompute_ref_log_probs": False}  # the second epoch begins with the fifth step
    expected = make_trainer(
        tmp_path / "a", train=Dataset.from_list(examples), train_sampling_strategy="sequential", **options
    )
    expected.train()
    trainer = make_trainer(tmp_path / "b", train=stream(examples), max_steps=6)
    assert trainer.args.precompute_ref_log_probs is False
    trainer.train()
    assert losses_of(trainer) == pytest.approx(losses_of(expected), abs=1e-6)
    assert trainer.data_reports["train"].kept == 14


def test_a_stream_with_reference_columns_needs_no_reference_model(tmp_path):
    examples = [{**e, "ref_chosen_logps": -5.0, "ref_rejected_logps": -50.0} for e in tiny_pairs(8)]
    columns = stream(examples).cast(Dataset.from_list(examples).features)
    trainer = make_trainer(tmp_path, train=columns, max_steps=2)
    assert trainer.args.precompute_ref_log_probs and trainer.ref_model is None
    trainer.train()
    assert trainer.state.log_history[0]["rewards/rejected"] > trainer.state.log_history[0]["rewards/chosen"]


def test_a_streams_run_is_resumed(tmp_path):
    examples = tiny_pairs(20)
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path / "a", train=stream(examples), max_steps=4, **saving)
    whole.train()
    resumed = make_trainer(tmp_path / "a", train=stream(examples), max_steps=4, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert losses_of(resumed)[-2:] == losses_of(whole)[-2:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "max_steps: expected a number of steps, as the training data is streamed"),
        (
            {"max_steps": 1, "precompute_ref_log_probs": True},
            "precompute_ref_log_probs=True is not supported with IterableDataset",
        ),
        ({"max_steps": 1, "max_tokens": "auto"}, "max_tokens: 'auto' probes"),
        ({"max_steps": 1, "dataloader_num_workers": 1}, "dataloader_num_workers: expected 0"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, train=stream(tiny_pairs(4)), **options)


def test_any_pairs_are_evaluated_and_predicted(tmp_path):
    trainer = make_trainer(tmp_path, evaluation=stream(tiny_pairs(5, seed=1)))
    more = [{**e, "row": 7, "source": "x"} for e in tiny_pairs(5, seed=1)]
    for data in (None, Dataset.from_list(more), stream(more), {"a": stream(more)}):
        metrics = trainer.evaluate(data)
        assert metrics["eval_a_loss" if isinstance(data, dict) else "eval_loss"] == pytest.approx(0.6931, abs=1e-4)
    output = trainer.predict(Dataset.from_list(more))
    assert output.metrics["test_loss"] == pytest.approx(0.6931, abs=1e-4)
    assert output.predictions.shape == (5, 2) and abs(output.predictions).max() < 1e-5
    assert list(trainer.pair_records["test"].table().rows) == [0, 1, 2, 3, 4]


def test_the_tokens_that_were_computed_are_counted(tmp_path):
    trainer = make_trainer(tmp_path, include_num_input_tokens_seen=True)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["num_input_tokens_seen"] for entry in logged] == [entry["num_tokens"] for entry in logged]
