"""`dpofast train`: train a model or an adapter on preference pairs; writes metrics.jsonl, training.png, report.html."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpofast.cli.arguments import parse, quiet
from dpofast.cli.load_models import Loading, is_adapter, load_model, load_tokenizer, lora, named, one_line
from dpofast.training.config import DPOConfig
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
        "router_aux_loss_coef",
    ),
    "reference": (
        *("ref_model", "precompute_ref_log_probs", "ref_cache_dir"),
        *("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
    ),
    "memory and packing": ("max_tokens", "share_prompts", "padded", "max_logits_bytes"),
    "data": ("split", "eval_split", "max_length", "truncation_mode", "on_bad_row", "dataset_num_proc"),
    "adapter and quantization": ("lora_alpha", "load_in_4bit", "dtype", "disable_dropout", "trust_remote_code"),
    "run and report": (
        *("config", "resume_from_checkpoint", "early_stopping_patience"),
        *("logging_steps", "token_statistics", "html_report", "bf16"),
    ),
    "names that are not needed here": (
        *("padding_free", "pad_to_multiple_of", "pad_token", "precompute_ref_batch_size", "activation_offloading"),
        "model_init_kwargs",
    ),
}
HELP_END = (
    "A switch whose default is True is turned off by --no_NAME. Every option of transformers.TrainingArguments works "
    "too (optimizer, schedule, bf16, gradient_checkpointing, evaluation, checkpoints, seed, logging, FSDP): `dpofast "
    "train --help_all` lists them."
)


@dataclass
class TrainArguments:
    """Options of `dpofast train` beside those of DPOConfig, which has every transformers.TrainingArguments option."""

    model: str = field(metadata={"help": "A folder or hub name that AutoModelForCausalLM loads (safetensors only)."})
    data: str = field(
        metadata={"help": "Preference pairs: a .jsonl or .parquet file, a datasets folder, or a hub name."}
    )
    eval_data: str | None = field(default=None, metadata={"help": "Held-out pairs, in the same formats."})
    split: str = field(default="train", metadata={"help": "The split of --data, where it has several."})
    eval_split: str = field(default="train", metadata={"help": "The split of --eval_data, where it has several."})
    ref_model: str | None = field(
        default=None,
        metadata={"help": "The reference, a folder or hub name; default: the model as it is before training."},
    )
    dtype: str = field(default="float32", metadata={"help": "The dtype models are loaded in: float32 or bfloat16."})
    lora_r: int = field(
        default=0, metadata={"help": "Rank of a LoRA adapter on every linear layer; 0 trains all weights."}
    )
    lora_alpha: int | None = field(default=None, metadata={"help": "LoRA's alpha; default 16."})
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "QLoRA: the frozen weights in 4 bits, by bitsandbytes; needs --lora_r."},
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop after so many evaluations in a row without a better metric_for_best_model (the loss, unless "
            "it is named); --load_best_model_at_end ends with the best one."
        },
    )
    html_report: bool = field(
        default=True, metadata={"help": "Write report.html, a page with plots, pairs and warnings, at the end."}
    )


def main(argv: Sequence[str]) -> int:
    """Train, and return 0.

    Raises:
        ValueError: an option, a model or data that cannot be used; nothing has been written then.
    """
    train, config = parse(
        (TrainArguments, DPOConfig),
        argv,
        prog="dpofast train",
        description=__doc__,
        help_groups=HELP_GROUPS,
        help_end=HELP_END,
    )
    interactive = sys.stderr.isatty()
    quiet(interactive)
    config.disable_tqdm = config.disable_tqdm or not interactive
    peft_config = lora(train.lora_r, train.lora_alpha)
    loading = _checked_loading(train, config)
    resume = _checked_output(config)
    config.logging_first_step = True
    if train.eval_data and config.eval_strategy == "no":
        config.eval_strategy = "epoch"
    callbacks = _early_stopping(train, config)
    if train.dtype == "bfloat16" and train.lora_r == 0:
        print(
            "dpofast: warning: with --dtype bfloat16 the weights themselves are bfloat16, and small updates round "
            "away; --bf16 keeps float32 weights and computes in bfloat16",
            file=sys.stderr,
        )

    from dpofast.data.load import load_preferences

    # What is cheap to check comes first; nothing is written before all input was accepted.
    tokenizer = load_tokenizer(train.model, trust_remote_code=config.trust_remote_code)
    train_data = load_preferences(train.data, split=train.split, on_bad_row=config.on_bad_row)
    eval_data = None
    if train.eval_data:
        eval_data = load_preferences(train.eval_data, split=train.eval_split, on_bad_row=config.on_bad_row)
    try:
        trainer = DPOTrainer(
            model=load_model(train.model, loading),
            ref_model=load_model(train.ref_model, loading) if train.ref_model else None,
            args=config,
            train_dataset=train_data,
            eval_dataset=eval_data,
            processing_class=tokenizer,
            peft_config=peft_config,
            callbacks=callbacks,
        )
    except (RuntimeError, ImportError) as error:  # a reporter that is not installed, or not wholly
        raise ValueError(one_line(error)) from error
    for report in trainer.data_reports.values() if trainer.is_world_process_zero() else ():
        print(report.summary())
    _run(trainer, Path(config.output_dir), resume, html_report=train.html_report)
    return 0


def _run(trainer: DPOTrainer, output: Path, resume: str | None, *, html_report: bool) -> None:
    from dpofast.report.page import write_report
    from dpofast.report.progress import follow
    from dpofast.report.training_plot import plot_training

    written = ["model", "metrics.jsonl"]
    follow(trainer, output / "metrics.jsonl")
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return
    logged = any("loss" in entry for entry in trainer.state.log_history)  # not in a run shorter than logging_steps
    if logged:
        plot_training(output / "metrics.jsonl", output / "training.png")
        written.append("training.png")
        if html_report:
            written.append(write_report(trainer, output / "report.html").name)
    print(f"{', '.join(written)} are in {output}")


def _checked_loading(train: TrainArguments, config: DPOConfig) -> Loading:
    if train.load_in_4bit and train.lora_r == 0:
        raise ValueError("load_in_4bit: 4-bit weights cannot be trained themselves, only an adapter on them: --lora_r")
    for name in filter(None, (train.model, train.ref_model)):
        if is_adapter(name):
            raise ValueError(
                f"{name} holds a LoRA adapter: merge it into its base model first (peft: "
                "AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(...))"
            )
    if train.ref_model == train.model:
        raise ValueError(f"ref_model: {named(train.model)} is the model itself, which is the reference by default")
    return Loading(dtype=train.dtype, trust_remote_code=config.trust_remote_code, load_in_4bit=train.load_in_4bit)


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
    from dpofast.checkpointing.folder import resolve_checkpoint
    from dpofast.scoring.ref_cache import CACHE_FOLDER

    output, resume = Path(config.output_dir), config.resume_from_checkpoint
    if output.exists() and not output.is_dir():
        raise ValueError(f"output_dir: {output} is a file, and a folder is needed")
    if resume is None:
        # A run that was killed before its first step has left reference log-probs, with which this one goes on.
        if output.is_dir() and any(entry.name != CACHE_FOLDER for entry in output.iterdir()):
            raise ValueError(
                f"output_dir: {output} is not empty: name another, remove it, or go on with its run by "
                "--resume_from_checkpoint latest"
            )
        return None
    return str(resolve_checkpoint(resume, output))
