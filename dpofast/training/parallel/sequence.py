"""Sequence parallelism of a run: the process group whose ranks compute the rows of a micro-batch together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from dpofast.common.ranks import process_groups
from dpofast.model.checks.support import is_recurrent
from dpofast.model.moe import balancing_coefficient
from dpofast.training.checks.images import has_images
from dpofast.training.config import DPOConfig
from dpofast.training.processing import WITHOUT_IMAGES

_BALANCING = "a load-balancing loss counts whole rows: set it to 0"

WITHOUT_DIVIDED_IMAGES = (
    "with sequence_parallel_size above 1 images are not supported, as their rows would go to other processes than the "
    "vision tower's results"
)


def check_divided_rows(args: DPOConfig) -> None:
    """Check that no option needs all rows of a micro-batch on one process, before anything is loaded.

    Raises:
        ValueError: one does, by name.
    """
    size = args.sequence_parallel_size
    refused = {
        "padded": (args.padded, "rows are divided inside packed attention: leave padded out"),
        "neftune_noise_alpha": (bool(args.neftune_noise_alpha), "noise is drawn for whole rows: leave it out"),
        "disable_dropout": (not args.disable_dropout, "dropout is drawn for whole rows: leave it at true"),
        "router_aux_loss_coef": (bool(args.router_aux_loss_coef), _BALANCING),
    }
    for name, (is_set, reason) in refused.items():
        if is_set and size > 1:
            raise ValueError(f"{name}: not supported with sequence_parallel_size={size}: {reason}")


def check_divided_model(config: Any, args: DPOConfig) -> None:
    """Check by a model's config that its rows can be divided; check_heads looks at its heads.

    Args:
        config: of the model; of a composite one, its language model's is read.
        args: the trainer's.

    Raises:
        ValueError: a load-balancing loss that the model has by default, or recurrent layers.
    """
    size, text = args.sequence_parallel_size, config.get_text_config()
    if size == 1:
        return
    if balancing := balancing_coefficient(text, args.router_aux_loss_coef):
        raise ValueError(
            f"router_aux_loss_coef: {text.model_type} has {balancing} by default, which is not supported with "
            f"sequence_parallel_size={size}: {_BALANCING}"
        )
    if is_recurrent(SimpleNamespace(config=config)):
        raise ValueError(
            f"sequence_parallel_size: {text.model_type} has recurrent layers, which need all rows one after the other, "
            f"and each of {size} processes would have every {size}-th: leave it at 1; fsdp shards large models"
        )


def check_no_images(dataset: Any, args: DPOConfig) -> None:
    """Check that the training data have no images where rows are divided, before anything is loaded.

    Raises:
        ValueError: a row has one.
    """
    if args.sequence_parallel_size > 1 and has_images(dataset):
        raise ValueError(f"train_dataset: it has images: {WITHOUT_DIVIDED_IMAGES}. {WITHOUT_IMAGES}")


def sequence_group(args: DPOConfig) -> Any:
    """Returns the process group of this rank and those that share its rows, or None without sequence parallelism.

    Its backend is that of the default group, so that rows are exchanged on the device. A collective of all processes:
    each makes the groups of all. Group g has the ranks [g·k, (g + 1)·k) of sequence_parallel_size = k.
    """
    size = args.sequence_parallel_size
    if size == 1:
        return None
    firsts = range(0, args.world_size, size)
    return process_groups([range(first, first + size) for first in firsts])[args.process_index // size]
