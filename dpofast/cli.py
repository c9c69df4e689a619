"""The command line: dpofast train | demo | info.

Whatever is wrong with what the user gave (a file, a row, a model, an option) ends in one message on stderr and exit
code 2, before anything is written.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

_USAGE = """usage: dpofast <command> [options]

commands:
  train   train a model on preference pairs            dpofast train --help
  demo    a small model, from scratch to DPO, minutes  dpofast demo --help
  info    what is installed and which path is used
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, or 2 after a message about the user's input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command in ("", "-h", "--help"):
        print(_USAGE)
        return 0 if command else 2
    if command not in _COMMANDS:
        print(_USAGE, file=sys.stderr)
        return _refuse(f"expected a command among {', '.join(_COMMANDS)}, got {command!r}")
    try:
        return _COMMANDS[command](rest)
    except KeyboardInterrupt:
        print("dpofast: stopped; checkpoints written so far can be resumed", file=sys.stderr)
        return 130
    except (ValueError, FloatingPointError, OSError) as error:
        if os.environ.get("DPOFAST_TRACEBACK"):
            raise
        return _refuse(str(error))


def _refuse(message: str) -> int:
    print(f"dpofast: error: {message}", file=sys.stderr)
    return 2


@dataclass
class TrainArguments:
    """What to train and on what; everything else is a DPOConfig (every transformers.TrainingArguments flag)."""

    model: str = field(metadata={"help": "A folder or hub name that AutoModelForCausalLM loads."})
    data: str = field(
        metadata={"help": "Preference pairs: a .jsonl or .parquet file, a datasets folder, or a hub name."}
    )
    eval_data: str | None = field(default=None, metadata={"help": "Held-out pairs, in the same formats."})
    split: str = field(default="train", metadata={"help": "The split of --data, where it has several."})
    eval_split: str = field(default="train", metadata={"help": "The split of --eval_data, where it has several."})
    dtype: str = field(default="float32", metadata={"help": "The dtype the model is loaded in: float32 or bfloat16."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow a model's own Python code to run."})
    lora_r: int = field(
        default=0, metadata={"help": "Rank of a LoRA adapter on every linear layer; 0 trains all weights."}
    )
    lora_alpha: int = field(default=16, metadata={"help": "LoRA's alpha."})


def _train(argv: Sequence[str]) -> int:
    train, config = _train_arguments(argv)
    from dpofast.data import load_preferences

    resume = _checked_output(config)
    config.logging_first_step = True
    if train.eval_data and config.eval_strategy == "no":
        config.eval_strategy = "epoch"
    if train.dtype == "bfloat16" and train.lora_r == 0:
        print(
            "dpofast: warning: with --dtype bfloat16 the weights themselves are bfloat16, and small updates round "
            "away; --bf16 keeps float32 weights and computes in bfloat16",
            file=sys.stderr,
        )

    # Input is looked at in the order of what is cheapest to refuse; nothing is written before all of it was accepted.
    tokenizer = _load_tokenizer(train)
    train_data = load_preferences(train.data, split=train.split, on_bad_row=config.on_bad_row)
    eval_data = None
    if train.eval_data:
        eval_data = load_preferences(train.eval_data, split=train.eval_split, on_bad_row=config.on_bad_row)
    model = _load_model(train)

    from dpofast.plots import plot_training
    from dpofast.progress import follow
    from dpofast.trainer import DPOTrainer

    try:
        trainer = DPOTrainer(
            model=model,
            args=config,
            train_dataset=train_data,
            eval_dataset=eval_data,
            processing_class=tokenizer,
            peft_config=_lora(train),
        )
    except RuntimeError as error:  # a reporter that is not installed
        raise ValueError(_one_line(error)) from error
    for report in trainer.data_reports.values():
        print(report.summary())
    output, written = Path(config.output_dir), ["model", "metrics.jsonl"]
    follow(trainer, output / "metrics.jsonl")
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    if any("loss" in entry for entry in trainer.state.log_history):  # not in a run shorter than logging_steps
        plot_training(output / "metrics.jsonl", output / "training.png")
        written.append("training.png")
    print(f"{', '.join(written)} are in {output}")
    return 0


def _checked_output(config: Any) -> str | None:
    """Refuse an output folder that is not empty, unless its run is resumed; returns the checkpoint to resume from.

    Files of an earlier run would mix with this one's: an adapter left beside full weights is loaded with them.
    """
    from dpofast.checkpoint_folder import resolve_checkpoint
    from dpofast.refcache import CACHE_FOLDER

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


def _train_arguments(argv: Sequence[str]) -> tuple[TrainArguments, Any]:
    """Flags, or --config file.yaml with flags on top of it."""
    from transformers import HfArgumentParser

    from dpofast.trainer import DPOConfig

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:  # argparse would print some hundred flags in front of it
            raise ValueError(f"{message}; `dpofast train --help` lists every option")

    # Unabbreviated: the file is looked for by its whole name, so a shortened --config would be taken and not read.
    arguments: Any = (TrainArguments, DPOConfig)
    parser = Parser(arguments, prog="dpofast train", allow_abbrev=False)
    parser.add_argument("--config", help="A YAML file of the same names; flags win over it.")
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    known, _ = early.parse_known_args(argv)
    flags = _yaml_flags(known.config) + list(argv) if known.config else list(argv)
    train, config, *_, unknown = parser.parse_args_into_dataclasses(
        args=flags, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        parser.error(f"unknown: {' '.join(unknown)}")
    return train, config


def _yaml_flags(path: str) -> list[str]:
    """The file's mapping as command-line flags, so that file and flags pass through one parser."""
    import yaml

    try:
        options = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: not a YAML file: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path}: expected a mapping of option names to values, got {type(options).__name__}")
    flags = []
    for name, value in options.items():
        if value is False and name.endswith("_strategy"):
            value = "no"  # what YAML makes of an unquoted no
        if isinstance(value, dict):
            value = json.dumps(value)
        if value is not None:
            values = value if isinstance(value, list) else [value]
            flags += [f"--{name}", *map(str, values)]
    return flags


def _load_tokenizer(train: TrainArguments) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(train.model, trust_remote_code=train.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{_named(train.model)}: no tokenizer can be loaded from it: {_one_line(error)}") from error


def _load_model(train: TrainArguments) -> Any:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if train.dtype not in dtypes:
        raise ValueError(f"dtype: expected one of {sorted(dtypes)}, got {train.dtype!r}")
    options = {"trust_remote_code": train.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(train.model, **options)
        if not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or ["ForCausalLM"]):
            raise ValueError(
                f"its architecture is {config.architectures}, and a decoder-only causal language model is needed"
            )
        return AutoModelForCausalLM.from_pretrained(train.model, dtype=dtypes[train.dtype], **options)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"{_named(train.model)}: no causal language model can be loaded from it: {_one_line(error)}"
        ) from error


def _named(model: str) -> str:
    return model if Path(model).is_dir() else f"{model} (no such folder, so a hub name)"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__


def _lora(train: TrainArguments) -> Any:
    if train.lora_r == 0:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError("lora_r: LoRA needs peft: pip install peft") from error
    # Dropout would make results depend on how pairs are packed, and the policy differ from its reference at step 0.
    return LoraConfig(
        r=train.lora_r,
        lora_alpha=train.lora_alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def _demo(argv: Sequence[str]) -> int:
    from dpofast.demo.run import main as demo

    return demo(argv)


def _info(argv: Sequence[str]) -> int:
    argparse.ArgumentParser(prog="dpofast info", description="What is installed and which path is used.").parse_args(
        argv
    )
    import torch

    from dpofast.attention import attention_report
    from dpofast.rows import choose_backend

    print(f"dpofast      {metadata.version('dpofast') if _installed('dpofast') else 'source checkout'}")
    print(f"python       {platform.python_version()} on {platform.machine()}")
    for package in ("torch", "triton", "transformers", "datasets", "accelerate", "peft"):
        print(f"{package:<12} {metadata.version(package) if _installed(package) else 'not installed'}")
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = accelerator or torch.device("cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    why = "a GPU runs the Triton kernels" if device.type in ("cuda", "xpu") else "no GPU: chunked torch, multi-threaded"
    print(f"device       {device.type} ({name})")
    print(f"log-probs    backend {choose_backend('auto', device)}: {why}")
    for kind, backend in attention_report(device).items():
        print(f"attention    {kind}: {backend}")
    print("packing      dpofast._C (C++)")
    return 0


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


_COMMANDS = {"train": _train, "demo": _demo, "info": _info}

if __name__ == "__main__":
    sys.exit(main())
