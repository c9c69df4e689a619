"""Memory of a training step: what an out-of-memory error is, and how many packed positions fit a device."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dpofast.common.memory import peak_resident, restart_peak_resident
from dpofast.common.ranks import Ranks
from dpofast.packing.batch import PackedBatch

# Of the memory that is free: the allocator's fragments and the longest rows of later steps need room too.
_USED_SHARE = 0.85
_CPU_MESSAGE = "DefaultCPUAllocator"
SAVE_MEMORY = "set gradient_checkpointing, a smaller max_length or max_logits_bytes, bf16, or train a LoRA adapter"

_logger = logging.getLogger(__name__)


class StepOutOfMemory(RuntimeError):
    """A step did not fit; nothing of it has reached the weights."""


def is_out_of_memory(error: BaseException) -> bool:
    """A device's or the CPU allocator's error for memory that is not there."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and _CPU_MESSAGE in str(error)
    )


def free_bytes(device: torch.device) -> int:
    """Bytes that this process can still allocate.

    Raises:
        ValueError: a device whose memory cannot be asked.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "cpu":
        available = re.search(r"MemAvailable:\s*(\d+) kB", _read("/proc/meminfo"))
        if available:
            return int(available[1]) * 1024
    raise ValueError(f"max_tokens: 'auto' cannot ask {device} how much memory is free; give a number")


def peak_bytes(device: torch.device, run: Callable[[], Any]) -> int:
    """What run() allocates at its peak, beyond what is there before: exact on CUDA, by resident pages on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    before = restart_peak_resident()
    run()
    return peak_resident() - before


def probe_max_tokens(probe: Callable[[int], int], device: torch.device, cap: int, *, kept: int = 0) -> int:
    """Positions of a micro-batch that fit: the line through the peaks of two, at the memory that is free.

    Args:
        probe: runs a micro-batch of about so many positions and returns how many they were; fewer where there is no
            more data.
        device: whose memory is asked.
        cap: the most to answer.
        kept: bytes that a running training keeps besides: optimizer states.

    Raises:
        ValueError: there is no room for anything, or a device whose memory cannot be asked.
    """
    peaks: dict[int, int] = {}
    for positions in (cap // 16, cap // 16, cap // 4):  # the first one warms up
        free = free_bytes(device)
        counted: list[int] = []

        def run(asked: int = positions, counted: list[int] = counted) -> None:
            counted.append(probe(asked))

        peak = peak_bytes(device, run)
        peaks[counted[0]] = peak
    (low, low_bytes), (high, high_bytes) = min(peaks.items()), max(peaks.items())
    if low == high:
        return cap  # all the data is one small micro-batch
    slope = max((high_bytes - low_bytes) / (high - low), 1.0)
    fixed = max(low_bytes - slope * low, 0.0)
    fitting = int((free * _USED_SHARE - kept - fixed) / slope)
    if fitting < 1:
        raise ValueError(
            f"max_tokens: 'auto' found no room for a micro-batch beside weights, gradients and optimizer: {SAVE_MEMORY}"
        )
    return min(fitting, cap)


def halved_max_tokens(max_tokens: int, batches: Sequence[PackedBatch], ranks: Ranks, step: int) -> int:
    """The budget with which a step that did not fit is done again: half of what its largest micro-batch took.

    Raises:
        RuntimeError: there was one pair at a time already.
    """
    several = ranks.all_reduce_max(max((batch.num_pairs for batch in batches), default=0)) > 1
    positions = int(ranks.all_reduce_max(max((batch.num_tokens for batch in batches), default=0)))
    if not several or max_tokens == 1:
        raise RuntimeError(
            f"out of memory at step {step} with one pair of up to {positions} positions at a time: {SAVE_MEMORY}"
        )
    halved = max(min(max_tokens, positions) // 2, 1)
    _logger.warning("out of memory at step %d: max_tokens is now %d, and the step is done again", step, halved)
    return halved


def random_states(device: torch.device) -> tuple[torch.Tensor, ...]:
    """The generators that a step draws from, so that it can be done again."""
    states = (torch.get_rng_state(),)
    return (*states, torch.cuda.get_rng_state(device)) if device.type == "cuda" else states


def restore_random_states(states: tuple[torch.Tensor, ...], device: torch.device) -> None:
    """Set the generators back to random_states."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
