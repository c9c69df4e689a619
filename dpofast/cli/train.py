"""`dpofast train`: train a model or an adapter on preference pairs; writes metrics.jsonl, training.png, report.html.

Its options are kept in run.yaml of the output folder: `dpofast train --resume FOLDER` goes on with a run.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dpofast.cli.adapters import LoraArguments, on_language_model, train_on
from dpofast.cli.arguments import DATA_HELP, parse, quiet
from dpofast.cli.load_models import (
    Loading,
    is_adapter,
    load_config,
    load_model,
    load_processing,
    load_tokenizer,
    named,
    one_line,
)
from dpofast.cli.run_options import RUN_FILE, RunOptions, resume_command, with_run_options
from dpofast.common.printable import printable
from dpofast.losses.own_kinds import import_from
from dpofast.training.checks.columns import check_column_names
from dpofast.training.checks.launch import check_topology
from dpofast.training.config import DPOConfig
from dpofast.training.parallel.fsdp import asks_for
from dpofast.training.parallel.sizes import check_heads
from dpofast.training.parallel.tensor import loading_options, second_reference
from dpofast.training.trainer import DPOTrainer

# What --help shows: first what nearly every run sets, then every other option of dpofast itself.
HELP_GROUPS = {
    "main options": (
        *("model", "data", "eval_data", "output_dir", "loss_type", "beta", "learning_rate"),
        *("per_device_train_batch_size", "num_train_epochs", "lora_r"),
    ),
    "loss": (
        *("loss_weights", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef", "ld_alpha"),
        *("use_weighting", "rpo_alpha", "ipo_average", "bco_delta", "discopop_tau", "simpo_gamma", "cpo_alpha"),
        *("alpha_po_alpha", "dpop_lambda", "beta_dpo_alpha", "beta_dpo_threshold", "score_temperature"),
        "router_aux_loss_coef",
    ),
    "reference": (
        *("ref_model", "precompute_ref_log_probs", "ref_cache_dir"),
        *("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
    ),
    "memory and packing": (
        "max_tokens",
        "share",
        "share_prompts",
        "padded",
        "max_logits_bytes",
        "flash_attention",
        "torch_compile",
        "activation_offloading",
    ),
    "several processes": ("tensor_parallel_size", "sequence_parallel_size"),
    "data": (
        *("split", "eval_split", "max_length", "truncation_mode", "on_bad_row", "dataset_num_proc", "preview"),
        *("list_pairs", "min_score_gap", "assistant_only_loss"),
    ),
    "adapter and quantization": (
        *("lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "load_in_4bit"),
        *("dtype", "attn_implementation", "disable_dropout", "neftune_noise_alpha", "freeze_vision_tower"),
        "trust_remote_code",
    ),
    "run and report": (
        *("config", "resume", "resume_from_checkpoint", "early_stopping_patience"),
        *("logging_steps", "token_statistics", "html_report", "bf16"),
    ),
    "names that are not needed here": (
        *("padding_free", "pad_to_multiple_of", "pad_token", "precompute_ref_batch_size", "model_init_kwargs"),
    ),
}
HELP_END = (
    "A switch whose default is True is turned off by --no_NAME. Every option of transformers.TrainingArguments works "
    "too (optimizer, schedule, bf16, gradient_checkpointing, evaluation, checkpoints, seed, logging, FSDP): `dpofast "
    "train --help_all` lists them."
)


@dataclass(kw_only=True)
class TrainArguments(LoraArguments):
    """Options of `dpofast train` beside those of DPOConfig, which has every transformers.TrainingArguments option."""

    model: str = field(
        metadata={
            "help": "A folder or hub name that AutoModelForCausalLM or AutoModelForImageTextToText loads (safetensors "
            "only), or the folder of a LoRA adapter, which is trained on."
        }
    )
    data: str = field(metadata={"help": DATA_HELP})
    eval_data: str | None = field(default=None, metadata={"help": "Held-out pairs, in the same formats."})
    split: str = field(default="train", metadata={"help": "The split of --data, where it has several."})
    eval_split: str = field(default="train", metadata={"help": "The split of --eval_data, where it has several."})
    ref_model: str | None = field(
        default=None,
        metadata={"help": "The reference, a folder or hub name; default: the model as it is before training."},
    )
    dtype: str = field(default="float32", metadata={"help": "The dtype models are loaded in: float32 or bfloat16."})
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "QLoRA: the frozen weights in 4 bits, by bitsandbytes; needs --lora_r."},
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "transformers' attention for the model's own calls: padded rows (--padded) and the check of packed "
            "ones, which attend by dpofast's backends. Default: the model's choice."
        },
    )
    resume: str | None = field(
        default=None,
        metadata={
            "help": "Go on with a run by the options in its run.yaml: its output folder, one of its checkpoints, or "
            "latest with --output_dir. Further flags win."
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop after so many evaluations in a row without a better metric_for_best_model (the loss, unless "
            "it is named); --load_best_model_at_end ends with the best one."
        },
    )
    preview: int = field(
        default=0,
        metadata={"help": "Print so many rows as they will be trained on, special tokens visible, and end."},
    )
    html_report: bool = field(
        default=True, metadata={"help": "Write report.html, a page with plots, pairs and warnings, at the end."}
    )


def main(argv: Sequence[str]) -> int:
    """Train, and return 0.

    Raises:
        ValueError: an option, a model or data that cannot be used; nothing has been written then.
    """
    import_from(os.getcwd())  # --loss_type module:function
    train, config, given = parse(
        (TrainArguments, DPOConfig),
        with_run_options(argv),
        prog="dpofast train",
        description=__doc__,
        help_groups=HELP_GROUPS,
        help_end=HELP_END,
    )
    interactive = sys.stderr.isatty()
    quiet(interactive)
    config.disable_tqdm = config.disable_tqdm or not interactive
    if train.preview < 0:
        raise ValueError(f"preview: expected a number of rows to print, got {train.preview}")
    if train.preview:
        return _preview(train, config)
    loading = _checked_loading(train, config)
    peft_config = train.lora_config()
    if "output_dir" not in given:  # transformers would write into a folder called trainer_output
        raise ValueError("output_dir: name the folder that the run is written to: --output_dir out")
    resume = _checked_output(config)
    config.logging_first_step = True
    if train.eval_data and config.eval_strategy == "no":
        config.eval_strategy = "epoch"
    callbacks = [RunOptions(given), *_early_stopping(train, config)]
    adapted = is_adapter(train.model)
    if train.dtype == "bfloat16" and train.lora_r == 0 and not adapted:
        print(
            "dpofast: warning: with --dtype bfloat16 the weights themselves are bfloat16, and small updates round "
            "away; --bf16 keeps float32 weights and computes in bfloat16",
            file=sys.stderr,
        )

    from dpofast.data.load import load_preferences

    # What is cheap to check comes first; nothing is written before all input was accepted.
    access = {"trust_remote_code": config.trust_remote_code}
    tokenizer = load_tokenizer(train.model, **access)
    train_data = load_preferences(train.data, split=train.split, on_bad_row=config.on_bad_row)
    eval_data = None
    if train.eval_data:
        eval_data = load_preferences(train.eval_data, split=train.eval_split, on_bad_row=config.on_bad_row)
    for name, data in ((train.data, train_data), (train.eval_data, eval_data)):
        if data is not None:
            check_column_names(data.column_names, config.preference_loss(), str(name), list_pairs=config.list_pairs)
    columns = {*train_data.column_names, *(eval_data.column_names if eval_data is not None else ())}
    processing = load_processing(train.model, tokenizer, columns, **access)
    ref_model = train.ref_model or (None if train.lora_r else second_reference(train.model, config))
    try:
        model = load_model(train.model, _divided(train.model, loading, config))
        layers = on_language_model(peft_config, model) if train.lora_r and not train.lora_target_modules else 0
        if layers and config.process_index == 0:
            print(
                f"dpofast: the adapter is on the {layers} linear layers of the language model; its other parts, such "
                "as a vision tower and its projector, stay as they are (--lora_target_modules names other layers)",
                file=sys.stderr,
            )
        trainer = DPOTrainer(
            model=train_on(model) if adapted else model,
            ref_model=load_model(ref_model, _divided(ref_model, loading, config)) if ref_model else None,
            args=config,
            train_dataset=train_data,
            eval_dataset=eval_data,
            processing_class=processing,
            peft_config=peft_config,
            callbacks=callbacks,
        )
    except RuntimeError as error:  # a reporter that is not installed
        raise ValueError(one_line(error)) from error
    for report in trainer.data_reports.values() if trainer.is_world_process_zero() else ():
        print(report.summary())
    _run(trainer, Path(config.output_dir), resume, html_report=train.html_report)
    return 0


def _preview(train: TrainArguments, config: DPOConfig) -> int:
    from transformers import ProcessorMixin

    from dpofast.data.images.prompt_images import PromptImages
    from dpofast.data.load import load_preferences
    from dpofast.data.preview import preview_preferences
    from dpofast.model.vision.inputs import vision_inputs

    access = {"trust_remote_code": config.trust_remote_code}
    tokenizer, images = load_tokenizer(train.model, **access), None
    dataset = load_preferences(train.data, split=train.split, on_bad_row=config.on_bad_row)
    processing = load_processing(train.model, tokenizer, dataset.column_names, **access)
    if isinstance(processing, ProcessorMixin):
        images = PromptImages(processing, vision_inputs(load_config(train.model, **access)))
    names = ("max_length", "truncation_mode", "on_bad_row", "list_pairs", "min_score_gap", "assistant_only_loss")
    options: Any = {name: getattr(config, name) for name in names}
    print(preview_preferences(dataset, tokenizer, train.preview, images=images, **options))
    return 0


def _run(trainer: DPOTrainer, output: Path, resume: str | None, *, html_report: bool) -> None:
    from transformers.utils import logging

    from dpofast.report.page import findings_of
    from dpofast.report.progress import follow

    logging.disable_progress_bar()  # of "Writing model shards", which would break into the bar of the steps
    follow(trainer, output / "metrics.jsonl")
    with trainer.output_locked():
        if resume is None and trainer.is_world_process_zero():
            _checked_output(trainer.args)  # another run may have come and gone since the first look
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
        if not trainer.is_world_process_zero():
            return
        written = ["model", "metrics.jsonl", *_draw(trainer, output, html_report=html_report)]
        print(printable(f"{', '.join(written)} are in {output}"))
        findings = findings_of(trainer)
        if findings:
            print("warnings" + (" (what to try is in report.html):" if "report.html" in written else ":"))
        for finding in findings:
            print(f"  {finding.title} ({finding.name})")


def _draw(trainer: DPOTrainer, output: Path, *, html_report: bool) -> list[str]:
    """Draw the run's pictures; returns their files. The model is written by now, so one that fails is a warning."""
    from dpofast.report.page import write_report
    from dpofast.report.training_plot import plot_training

    if not any("loss" in entry for entry in trainer.state.log_history):  # a run shorter than logging_steps
        return []
    drawn = []
    for name, draw in (
        ("training.png", lambda path: plot_training(output / "metrics.jsonl", path)),
        ("report.html", lambda path: write_report(trainer, path)),
    ):
        if name == "report.html" and not html_report:
            continue
        try:
            draw(output / name)
            drawn.append(name)
        except (OSError, ValueError) as error:
            warnings.warn(f"{output / name} could not be written: {error}", stacklevel=2)
    return drawn


def _checked_loading(train: TrainArguments, config: DPOConfig) -> Loading:
    train.check_lora(disable_dropout=config.disable_dropout)
    if train.resume is not None:
        raise ValueError("resume: is a flag and no option of a YAML file: dpofast train --resume FOLDER")
    adapted = is_adapter(train.model)
    if adapted and train.lora_r:
        raise ValueError(
            f"lora_r: {train.model} holds an adapter of its own, which is trained on: leave lora_r out; or, for a new "
            "adapter on top, merge this one into its base model first (peft: AutoPeftModelForCausalLM"
            ".from_pretrained(...).merge_and_unload().save_pretrained(...))"
        )
    if train.load_in_4bit and train.lora_r == 0 and not adapted:
        raise ValueError("load_in_4bit: 4-bit weights cannot be trained themselves, only an adapter on them: --lora_r")
    if train.ref_model == train.model:
        raise ValueError(f"ref_model: {named(train.model)} is the model itself, which is the reference by default")
    check_topology(config)
    if config.tensor_parallel_size * config.sequence_parallel_size > 1:
        check_heads(load_config(train.model, trust_remote_code=config.trust_remote_code), config)
    return Loading(
        dtype=train.dtype,
        trust_remote_code=config.trust_remote_code,
        load_in_4bit=train.load_in_4bit,
        storage=torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None,
        attn_implementation=train.attn_implementation,
        to_shard=asks_for(config, "fsdp") and train.lora_r == 0,
    )


def _divided(name: str, loading: Loading, config: DPOConfig) -> Loading:
    """The same with what divides the model over processes (tensor parallelism), if the arguments say so.

    Raises:
        ValueError: it cannot be divided so, before anything is loaded; an adapter's folder.
    """
    if config.tensor_parallel_size == 1:
        return loading
    if is_adapter(name):
        raise ValueError(
            f"tensor_parallel_size: {named(name)} is an adapter, which cannot be read onto a model that is divided: "
            "merge it into its base model first (peft: AutoPeftModelForCausalLM.from_pretrained(...)"
            ".merge_and_unload().save_pretrained(...)); --lora_r trains a new one"
        )
    of_model = load_config(name, trust_remote_code=config.trust_remote_code)
    check_heads(of_model, config)
    given = {"quantization_config": True} if loading.load_in_4bit else {}
    return replace(loading, options=loading_options(of_model, config, given))


def _early_stopping(train: TrainArguments, config: DPOConfig) -> list[Any]:
    patience = train.early_stopping_patience
    if patience is None:
        return []
    from transformers import EarlyStoppingCallback

    if patience < 1:
        raise ValueError(f"early_stopping_patience: expected 1 or more evaluations, got {patience}")
    if not train.eval_data:
        raise ValueError("early_stopping_patience: needs held-out pairs to evaluate: --eval_data")
    if config.metric_for_best_model is None:
        config.metric_for_best_model, config.greater_is_better = "loss", False
    return [EarlyStoppingCallback(patience)]


def _checked_output(config: Any) -> str | None:
    """Check that the output folder is empty or its run is resumed; returns the checkpoint to resume from.

    Files of an earlier run would mix with this one's: an adapter left beside full weights is loaded with them.
    """
    from dpofast.checkpointing.folder import LOCK, resolve_checkpoint
    from dpofast.scoring.ref_cache import CACHE_FOLDER

    output, resume = Path(config.output_dir), config.resume_from_checkpoint
    if output.exists() and not output.is_dir():
        raise ValueError(f"output_dir: {output} is a file, and a folder is needed")
    if resume is None:
        # A run that was killed before its first step has left reference log-probs, with which this one goes on.
        if output.is_dir() and any(entry.name not in (CACHE_FOLDER, LOCK, RUN_FILE) for entry in output.iterdir()):
            way = resume_command(output) if (output / RUN_FILE).is_file() else "--resume_from_checkpoint latest"
            raise ValueError(
                f"output_dir: {output} is not empty: name another, remove it, or go on with its run: {way}"
            )
        return None
    return str(resolve_checkpoint(resume, output))
