"""Checks of devices, processes, launchers and streams, and the trainer's own copy of its arguments."""

from __future__ import annotations

import copy
import os
import warnings
from typing import Any

import numpy as np
import torch.distributed as dist
from datasets import Dataset, IterableDataset

from dpofast.common.ranks import Ranks
from dpofast.data.token_rows import as_numpy, has_lists, has_reference, reference_columns, without_reference
from dpofast.model.parts import beside_text
from dpofast.packing.pack import pack
from dpofast.training.checks.arguments import as_dpo_config
from dpofast.training.config import DPOConfig
from dpofast.training.data.tokens import no_precomputed_stream, streams_reference
from dpofast.training.parallel.fsdp import check_sharding
from dpofast.training.parallel.sequence import check_no_images
from dpofast.training.parallel.sizes import check_sizes
from dpofast.training.sampler import PairLengths


def own_arguments(args: Any, train_dataset: Any) -> DPOConfig:
    """Returns a checked copy of the trainer's arguments, with gradient accumulation folded into the batch size.

    The trainer divides a step into micro-batches itself, so transformers' Trainer sees one batch a step.

    Args:
        args: a DPOConfig, TRL's, or None for the default.
        train_dataset: the training data; of a stream, reference log-probs are computed in the step unless it has them.

    Raises:
        ValueError: what as_dpo_config, check_topology, check_no_images and check_stream refuse.
    """
    args = copy.copy(as_dpo_config(args))
    check_topology(args)
    check_no_images(train_dataset, args)
    if isinstance(train_dataset, IterableDataset):
        check_stream(train_dataset, args)
    args.per_device_train_batch_size *= args.gradient_accumulation_steps
    args.gradient_accumulation_steps = 1
    args.dataloader_pin_memory = False  # batches are numpy arrays until they are packed
    return args


def check_stream(dataset: IterableDataset, args: DPOConfig) -> None:
    """Check the arguments for training data that is streamed, and choose a live reference where nothing is said.

    Raises:
        ValueError: no max_steps; a precomputed reference, max_tokens="auto" or data-loading workers, which need random
            access.
    """
    if args.max_steps <= 0:
        raise ValueError(
            "max_steps: expected a number of steps, as the training data is streamed and its length is not known, got "
            f"{args.max_steps}"
        )
    if not streams_reference(dataset) and args.preference_loss().needs_reference:
        if args.chose_precompute:
            args.precompute_ref_log_probs = False
        if args.precompute_ref_log_probs:
            raise no_precomputed_stream()
    if args.max_tokens == "auto":
        raise ValueError("max_tokens: 'auto' probes with the first rows of the data, and these are streamed: a number")
    if args.dataloader_num_workers > 0:
        raise ValueError("dataloader_num_workers: expected 0, as one process reads a stream in its order")


def check_topology(args: DPOConfig) -> None:
    """Check the trainer's arguments against the processes and the environment of a launcher.

    Raises:
        ValueError: a DPOConfig made for another number of processes; several GPUs in one process; accelerate's own
            compiler; what check_sharding and check_sizes refuse.
    """
    if args.n_gpu > 1:
        raise ValueError(f"DPOTrainer uses one GPU, and {args.n_gpu} are visible: set CUDA_VISIBLE_DEVICES")
    if dist.is_initialized() and dist.get_world_size() > 1 and args.world_size == 1:
        raise ValueError(
            f"args: expected {dist.get_world_size()} processes that train together, as torch.distributed has been "
            "initialized, got a DPOConfig made for one: make it under the launcher (torchrun), with use_cpu on a CPU"
        )
    if (compiler := os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()) != "no":
        raise ValueError(
            f"dynamo_backend: expected no, got {compiler}: accelerate would compile the whole model, anew for every "
            "batch; set torch_compile, which compiles its layers"
        )
    check_sharding(args)
    check_sizes(args)


def find_unused_vision_weights(model: Any, args: DPOConfig, accelerator: Any) -> None:
    """Let DDP search in every step for weights without a gradient, where vision weights train: see docs/vision.md.

    Raises:
        ValueError: ddp_find_unused_parameters=False there, on several processes.
    """
    if not any(weight.requires_grad for weight in beside_text(model)):
        return
    if args.ddp_find_unused_parameters is False and accelerator.num_processes > 1:
        raise ValueError(
            "ddp_find_unused_parameters: expected True or nothing, as vision weights train and a process's pairs may "
            "have no images, got False: leave it out, or train an adapter of the language model alone"
        )
    if accelerator.ddp_handler is not None:
        accelerator.ddp_handler.find_unused_parameters = True  # by default not with gradient checkpointing


def check_options_of_sharded(args: DPOConfig) -> None:
    """Refuse options that need a model which is whole on every rank; for FSDP and DeepSpeed.

    Raises:
        ValueError: sync_ref_model or max_tokens="auto".
    """
    if args.sync_ref_model:
        raise ValueError("sync_ref_model: expected a policy that is whole on every rank, and this one is sharded")
    if args.max_tokens == "auto":
        raise ValueError("max_tokens: 'auto' cannot probe a model that is sharded later; give a number")


def check_reference_used(args: DPOConfig, ref_model: Any, train_dataset: Any, eval_dataset: Any) -> None:
    """Refuse a reference model that the reference log-probs in the data leave unused; warn where they do so in part.

    Args:
        args: the trainer's.
        ref_model: a separate reference, or None.
        train_dataset: the training data, or None.
        eval_dataset: a dataset, a dict of several, or None.

    Raises:
        ValueError: every dataset has the columns; with sync_ref_model, the training data have them.
    """
    parts = eval_dataset.items() if isinstance(eval_dataset, dict) else [("", eval_dataset)]
    given = {"train_dataset": train_dataset, **{f"eval_dataset {name}".strip(): each for name, each in parts}}
    given = {name: each for name, each in given.items() if each is not None}
    bringing = {name: each.column_names for name, each in given.items() if has_reference(each.column_names)}
    columns = " and ".join(dict.fromkeys(name for each in bringing.values() for name in reference_columns(each)))
    if args.sync_ref_model and "train_dataset" in bringing:
        raise ValueError(
            f"sync_ref_model: the training data bring {columns}, which do not move: remove the columns "
            "(train_dataset.remove_columns), or leave sync_ref_model off"
        )
    if ref_model is None or not bringing:
        return
    if len(bringing) == len(given):
        raise ValueError(
            f"ref_model: the data ({', '.join(bringing)}) bring {columns}, which are used as they are, so ref_model "
            "would never be asked: leave it out, or remove the columns (remove_columns)"
        )
    warnings.warn(
        f"ref_model: {', '.join(bringing)} brings {columns}, which are used as they are; ref_model is asked for the "
        "other datasets only",
        stacklevel=4,
    )


def check_pairs(dataset: Dataset, args: DPOConfig, ranks: Ranks, share: str) -> None:
    """Refuse dataloader_drop_last where it would leave no step; warn where max_tokens does not bound a micro-batch.

    Args:
        dataset: the training data, token ids.
        args: the trainer's.
        ranks: the processes that train.
        share: as in `pack`, in training.

    Raises:
        ValueError: fewer pairs than a step has.
    """
    num_pairs, step = len(dataset), args.per_device_train_batch_size * ranks.size
    unit = "list" if has_lists(dataset.column_names) else "pair"
    if args.dataloader_drop_last and num_pairs < step:
        raise ValueError(
            f"dataloader_drop_last: {num_pairs} {unit}s are fewer than the {step} of a step, so nothing would be "
            "trained: leave it off, or set a smaller per_device_train_batch_size"
        )

    if not isinstance(args.max_tokens, int) or ranks.rank != 0 or num_pairs == 0:
        return
    lengths = PairLengths.of(dataset)
    # without what responses share beyond their prompt
    most = lengths.positions + ((lengths.responses - 1) * lengths.prompts if share == "none" else 0)
    for row in np.argsort(-most, kind="stable"):
        if most[row] <= args.max_tokens:
            return
        example = as_numpy(dataset)[int(row)]
        positions = pack([without_reference(example)], share=share)[0].num_tokens
        if positions > args.max_tokens:
            break
    else:
        return
    warnings.warn(
        f"max_tokens: {args.max_tokens} is less than the {positions} positions of a long {unit}: such a {unit} runs "
        "alone, and takes the memory of all its positions. A smaller max_length cuts it",
        stacklevel=3,
    )
