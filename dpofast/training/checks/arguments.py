"""Arguments of DPOTrainer in TRL's names: taken where they mean something here, else refused with what to use."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from transformers import TrainingArguments

from dpofast.training.config import DPOConfig


def as_dpo_config(args: Any) -> DPOConfig:
    """Returns a DPOConfig: args itself, one of the same options for a DPOConfig of TRL, or the default for None.

    Raises:
        ValueError: another class, or an option of it that has no place here, by name.
    """
    if args is None:
        return DPOConfig(output_dir="dpofast-output")
    if isinstance(args, DPOConfig):
        return args
    of_trl = any(cls.__name__ == "DPOConfig" for cls in type(args).__mro__)  # not its KTOConfig and the like
    if not isinstance(args, TrainingArguments) or not of_trl:
        cls = type(args)
        raise ValueError(f"args: expected a dpofast.DPOConfig, got {cls.__module__.split('.')[0]}.{cls.__name__}")
    known = {f.name for f in fields(DPOConfig) if f.init}
    values: dict[str, Any] = {}
    for f in fields(args):
        value = getattr(args, f.name, None)
        if f.name in known:
            values[f.name] = value
        elif value != (f.default_factory() if f.default_factory is not MISSING else f.default):
            raise ValueError(
                f"args: {f.name}={value!r} of {type(args).__module__.split('.')[0]}.{type(args).__name__} is no option "
                "of dpofast.DPOConfig: leave it out"
            )
    return DPOConfig(**values)


def check_arguments(data_collator: Any, compute_metrics: Any, processing_class: Any, peft_config: Any) -> None:
    """Check those of DPOTrainer's arguments that other objects are easily mistaken for.

    Raises:
        ValueError: a collator or compute_metrics, of which the step has no use; no tokenizer, no adapter's config.
    """
    if data_collator is not None:
        raise ValueError(
            f"data_collator: expected None, as pairs are packed by dpofast, got {type(data_collator).__name__}: pass "
            "train_dataset, eval_dataset and processing_class by name"
        )
    if compute_metrics is not None:
        raise ValueError(
            "compute_metrics: expected None, as no logits of an evaluation are kept: evaluate() has accuracies and "
            "margins, and trainer.pair_records the log-probs and rewards of every pair, after every evaluation"
        )
    if isinstance(processing_class, TrainingArguments) or hasattr(processing_class, "column_names"):
        raise ValueError(
            f"processing_class: expected a tokenizer, a processor or None, got {type(processing_class).__name__}: pass "
            "arguments by name"
        )
    if peft_config is not None and not hasattr(peft_config, "peft_type"):
        raise ValueError(
            f"peft_config: expected a config of peft such as LoraConfig, got {type(peft_config).__name__}: pass "
            "arguments by name"
        )
