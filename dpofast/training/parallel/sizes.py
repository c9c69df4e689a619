"""How the processes of a run are divided: sizes of the groups that share a model, and what they must divide.

Consecutive processes share: first those of a tensor-parallel or a sequence-parallel group, which have the same pairs.
The others differ in their pairs (data parallelism, replicated or sharded by FSDP2 or ZeRO-3).
"""

from __future__ import annotations

from typing import Any

from dpofast.training.config import DPOConfig
from dpofast.training.parallel.sequence import check_divided_model, check_divided_rows
from dpofast.training.parallel.tensor import check_tensor_parallel


def check_sizes(args: DPOConfig) -> None:
    """Check the sizes of groups against the number of processes and the other options, before anything is loaded.

    Raises:
        ValueError: sizes that do not divide the processes, both kinds at once, padded rows, or an option that needs
            all rows of a micro-batch on one process.
    """
    sizes = {name: getattr(args, name) for name in ("tensor_parallel_size", "sequence_parallel_size")}
    for name, size in sizes.items():
        if args.world_size % size:
            fitting = [number for number in range(1, args.world_size + 1) if args.world_size % number == 0]
            raise ValueError(
                f"{name}: expected a divisor of the {args.world_size} processes ({', '.join(map(str, fitting))}), got "
                f"{size}: start a multiple of {size} processes (torchrun --nproc_per_node {size})"
            )
    if min(sizes.values()) > 1:
        raise ValueError(
            f"tensor_parallel_size, sequence_parallel_size: expected one of them above 1, got {sizes}: divide rows "
            "for long sequences (sequence_parallel_size, with fsdp for large models), layers for large models"
        )
    if args.tensor_parallel_size > 1:
        check_tensor_parallel(args)
    check_divided_rows(args)


def check_heads(config: Any, args: DPOConfig) -> None:
    """Check that a model's attention heads can be divided, by its config alone.

    Args:
        config: of the model; of a composite one, its language model's is read.
        args: the trainer's.

    Raises:
        ValueError: heads that the groups cannot divide, with the sizes that they can; layers or a loss that
            sequence parallelism cannot.
    """
    check_divided_model(config, args)
    text = config.get_text_config()
    queries = getattr(text, "num_attention_heads", None)
    if queries is None:
        return
    keys = getattr(text, "num_key_value_heads", None) or queries
    most = args.world_size
    for name, divides in (("tensor_parallel_size", divides_layers), ("sequence_parallel_size", divides_rows)):
        size = getattr(args, name)
        if not divides(size, queries, keys):
            fitting = [number for number in range(1, most + 1) if most % number == 0 and divides(number, queries, keys)]
            raise ValueError(
                f"{name}: {text.model_type} has {queries} query and {keys} key/value heads, which {size} processes "
                f"cannot divide evenly; of {most} processes {', '.join(map(str, fitting))} can share"
            )


def divides_layers(size: int, queries: int, keys: int) -> bool:
    """Whether tensor parallelism over so many processes divides these numbers of heads."""
    return queries % size == 0 and keys % size == 0


def divides_rows(size: int, queries: int, keys: int) -> bool:
    """Whether sequence parallelism does: fewer key/value heads than processes are copied to several of them."""
    return queries % size == 0 and (keys % size == 0 or size % keys == 0)
