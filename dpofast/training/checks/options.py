"""Options of transformers.TrainingArguments that the step never reads: refused where they are set to something else.

A test derives the rest of TrainingArguments' fields from the sources: each is read, is listed here, or is MOOT.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from transformers import TrainingArguments

# name -> why, and what to use
UNREAD = {
    "label_smoothing_factor": "not used by DPO; the probability that a preference is flipped is label_smoothing",
    "bf16_full_eval": "evaluation computes as training does; set bf16, or load the model in bfloat16",
    "fp16_full_eval": "evaluation computes as training does; set fp16 or bf16, or load the model in bfloat16",
    "use_cache": "a training step reads no cache, and the saved model keeps its own setting",
    "torch_empty_cache_steps": "memory is bounded by max_tokens and max_logits_bytes",
    "auto_find_batch_size": "pairs per step is a hyperparameter; max_tokens is halved where memory runs out, and "
    "max_tokens='auto' probes what fits",
    "average_tokens_across_devices": "a step's loss is a mean over the pairs of all ranks, always",
    "include_for_metrics": "there is no compute_metrics: trainer.pair_records has the log-probs and rewards of every "
    "pair of an evaluation",
    "batch_eval_metrics": "there is no compute_metrics: trainer.pair_records has the log-probs and rewards of every "
    "pair of an evaluation",
    "label_names": "a pair's labels are its responses",
    "length_column_name": "nothing is grouped by length: packing leaves no pads",
    "dataloader_in_order": "steps are taken in the order of the seed, so that a run can be resumed",
    "ddp_broadcast_buffers": "a language model's buffers never change",
}
_SAMPLING = "steps are divided among ranks by the sampler of dpofast; leave it out"
UNREAD_OF_ACCELERATOR = dict.fromkeys(("split_batches", "dispatch_batches", "even_batches"), _SAMPLING)
# What these ask for is always so, or they concern a caller's script alone.
MOOT = {
    "prediction_loss_only": "no predictions are kept beside the metrics",
    "eval_accumulation_steps": "no predictions are accumulated on the device",
    "eval_do_concat_batches": "no predictions are kept",
    "eval_use_gather_object": "metrics are gathered by objects",
    "remove_unused_columns": "training reads the columns that it knows",
    "restore_callback_states_from_checkpoint": "callbacks' states are always restored",
    "logging_nan_inf_filter": "a loss that is not finite stops the run with its rows",
    "dataloader_pin_memory": "batches are packed on the CPU and copied without waiting",
    "do_train": "for scripts: Trainer does not read it",
    "do_predict": "for scripts: Trainer does not read it",
    "local_rank": "for launchers of old: the environment says it",
}
# Sizes of accelerate's ParallelismConfig, and what to set in place of those that are refused.
_PARALLEL = {
    "tp_size": "",
    "dp_shard_size": "",
    "cp_size": "set sequence_parallel_size, which divides rows",
    "sp_size": "set sequence_parallel_size, which divides rows",
    "dp_replicate_size": "between groups of tp_size processes the model is sharded: set dp_shard_size",
}
# Options of TRL's DPOConfig that packing has no use for: the values that ask for nothing, and why others are refused.
OF_TRL: dict[str, tuple[tuple[Any, ...], str]] = {
    "pad_to_multiple_of": (("auto", None), "packed rows have no pads"),
    "precompute_ref_batch_size": ((None,), "the reference pass packs by max_tokens, which changes rounding only"),
    "pad_token": ((None,), "packed rows have no pads; set tokenizer.pad_token for the saved tokenizer"),
}


def check_options(args: Any) -> None:
    """Check a DPOConfig after TrainingArguments' own __post_init__.

    Raises:
        ValueError: an option that not supported here is set, with what to use.
    """
    defaults = {
        f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(TrainingArguments)
    }
    for name, reason in UNREAD.items():
        value = getattr(args, name, defaults.get(name))  # not every supported transformers has all of them
        if name in defaults and value != defaults[name]:
            raise ValueError(f"{name}: not supported here: {reason}")
    for name, reason in UNREAD_OF_ACCELERATOR.items():
        value = getattr(args.accelerator_config, name, None)
        if value != getattr(type(args.accelerator_config)(), name, None):
            raise ValueError(f"accelerator_config: {name}: not supported here: {reason}")
    _adopt_parallelism(args)
    for name, (nothing, reason) in OF_TRL.items():
        if getattr(args, name) not in nothing:
            raise ValueError(f"{name}: expected {nothing[0]}, got {getattr(args, name)!r}: {reason}")
    if args.padding_free and args.padded:
        raise ValueError("padding_free: packed rows have no pads; leave out either padding_free or padded")
    if args.activation_offloading and not args.gradient_checkpointing:
        raise ValueError(
            "activation_offloading: expected gradient_checkpointing beside it, which keeps little of each layer; all "
            "that a layer computes would be copied to the CPU: set both, or neither"
        )


def _adopt_parallelism(args: Any) -> None:
    """Read accelerate's parallelism_config as tensor_parallel_size, and take it off: transformers makes its own.

    Raises:
        ValueError: sizes that do not multiply to the number of processes, or of other kinds of parallelism.
    """
    config = getattr(args, "parallelism_config", None)
    sizes = {name: getattr(config, name, None) or 1 for name in _PARALLEL}
    for name, instead in _PARALLEL.items():
        if instead and sizes[name] > 1:
            raise ValueError(f"parallelism_config: {name}: not supported here: {instead}")
    size = sizes["tp_size"]
    if size == 1:
        return
    if sizes["dp_shard_size"] * size != args.world_size:
        raise ValueError(
            f"parallelism_config: expected tp_size · dp_shard_size = {args.world_size} processes, got {size} · "
            f"{sizes['dp_shard_size']}: set dp_shard_size={max(1, args.world_size // size)}, or start "
            f"{size * sizes['dp_shard_size']} processes"
        )
    if args.tensor_parallel_size not in (1, size):
        raise ValueError(
            f"tensor_parallel_size: expected {size} as parallelism_config says, or nothing, got "
            f"{args.tensor_parallel_size}: leave one of them out"
        )
    args.tensor_parallel_size, args.parallelism_config = size, None
