"""Commands under a launcher (torchrun): the processes share the rows, and the first one writes and prints."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dpofast.common.output import is_told, mark_as_told
from dpofast.common.ranks import Ranks

T = TypeVar("T")


@contextlib.contextmanager
def launched(device: torch.device) -> Iterator[Ranks]:
    """Inside, the processes of a launcher are a process group, each with a device of its own; without one, this alone.

    Args:
        device: of this machine's kind; processes on CPUs exchange by gloo.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "RANK" not in os.environ:
        yield Ranks.alone()
        return
    if device.type != "cpu":
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group(dist.get_default_backend_for_device(device))
    try:
        yield Ranks()
    finally:
        dist.destroy_process_group()


def agreed(ranks: Ranks, part: Callable[[], T]) -> list[T]:
    """Run on every process, which all call this; returns the results of all.

    An error on one is raised on all, so that none waits; those where it did not happen do not tell the user.
    """
    problem, result = None, None
    try:
        result = part()
    except Exception as error:
        problem = error
    outcomes: list[Any] = ranks.all_gather((problem, result))
    failed = [(is_told(theirs), rank, theirs) for rank, (theirs, _) in enumerate(outcomes) if theirs is not None]
    if failed:
        _, rank, first = min(failed, key=lambda each: each[:2])  # not one that a process has from another
        raise mark_as_told(problem or first) if rank != ranks.rank else problem or first
    return [theirs for _, theirs in outcomes]


def by_the_first(ranks: Ranks, part: Callable[[], T]) -> T:
    """Run on the first process alone; returns its result on all, and raises its error on all."""
    return agreed(ranks, lambda: part() if ranks.process == 0 else None)[0]  # type: ignore[return-value]


def with_the_others(ranks: Ranks, part: Callable[[], T]) -> T:
    """Run on every process, which all call this; returns this one's result. Errors are as of agreed()."""
    results: list[T] = []
    agreed(ranks, lambda: results.append(part()))
    return results[0]
