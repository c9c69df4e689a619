"""Memory of a training step: recognize and recover from out-of-memory errors, and find max_tokens by measuring."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from dpofast.common.memory import peak_resident, restart_peak_resident
from dpofast.common.ranks import Ranks
from dpofast.packing.batch import PackedBatch

# max_tokens: large enough for full GEMM speed; on a CPU a pass without gradients is fastest where its activations stay
# in cache. More than _AUTO_TOKENS_GPU makes nothing faster.
_MAX_TOKENS_GPU, _MAX_TOKENS_CPU, _FORWARD_TOKENS_CPU, _AUTO_TOKENS_GPU = 16384, 2048, 1024, 65536
# Of the memory that is free: the allocator's fragments and the longest rows of later steps need room too.
_USED_SHARE = 0.85
_CPU_MESSAGES = ("DefaultCPUAllocator", "std::bad_alloc")  # in a RuntimeError, of torch's allocator and of C++'s
SAVE_MEMORY = "set gradient_checkpointing, a smaller max_length or max_logits_bytes, bf16, or train a LoRA adapter"

_logger = logging.getLogger(__name__)
_T = TypeVar("_T")


def token_limits(max_tokens: int | str | None, device: torch.device, sharing: int = 1) -> tuple[int, int]:
    """Packed positions of a micro-batch in training, and in a pass without gradients; "auto" begins with the default.

    Args:
        max_tokens: DPOConfig's.
        device: where the model runs.
        sharing: how many processes share a micro-batch's positions; each has as many by default as one alone.
    """
    if isinstance(max_tokens, int):
        return max_tokens, max_tokens  # what rows share is computed once in so many positions
    own = (_MAX_TOKENS_CPU, _FORWARD_TOKENS_CPU) if device.type == "cpu" else (_MAX_TOKENS_GPU, _MAX_TOKENS_GPU)
    return own[0] * sharing, own[1] * sharing


def largest_auto(device: torch.device, sharing: int = 1) -> int:
    """The largest max_tokens that "auto" chooses, where so many processes share a micro-batch's positions."""
    return (_MAX_TOKENS_CPU if device.type == "cpu" else _AUTO_TOKENS_GPU) * sharing


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is that of a device's or of the CPU's allocator for memory that is not free."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(message in str(error) for message in _CPU_MESSAGES)
    )


def unless_out_of_memory(run: Callable[[], _T], *, recoverable: bool) -> _T | None:
    """Returns run()'s result, or None where memory ran out.

    The error's traceback refers to the frames of run() and so to the graph in them; both are released on return, so
    that torch.cuda.empty_cache() has something to free.

    Args:
        run: what may run out of memory.
        recoverable: False raises the error.
    """
    try:
        return run()
    except (RuntimeError, MemoryError) as error:
        if not (recoverable and is_out_of_memory(error)):
            raise
    return None


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
    """Returns the peak of what run() allocates, in bytes: from the allocator on CUDA, from resident pages on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    before = restart_peak_resident()
    run()
    return peak_resident() - before


def probe_max_tokens(probe: Callable[[int], int], device: torch.device, cap: int, *, kept: int = 0) -> int:
    """Returns how many packed positions of a micro-batch fit into free memory.

    Peak memory is measured at two sizes; the line through both is solved for the memory that is free.

    Args:
        probe: runs a micro-batch of about so many positions and returns how many they were; fewer where there is no
            more data.
        device: whose memory is asked.
        cap: the most to answer.
        kept: bytes that training will allocate besides, for optimizer states.

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
    """Returns the max_tokens to repeat a step with that ran out of memory: half of its largest micro-batch.

    Raises:
        RuntimeError: every micro-batch had one pair or list already.
    """
    several = ranks.all_reduce_max(max((batch.num_pairs for batch in batches), default=0)) > 1
    positions = int(ranks.all_reduce_max(max((batch.num_tokens for batch in batches), default=0)))
    if not several or max_tokens == 1:
        raise RuntimeError(
            f"out of memory at step {step} with one row of up to {positions} positions at a time: {SAVE_MEMORY}"
        )
    halved = max(min(max_tokens, positions) // 2, 1)
    _logger.warning("out of memory at step %d: max_tokens is now %d, and the step is done again", step, halved)
    return halved


def give_back(device: torch.device) -> None:
    """Return memory that no tensor uses from CUDA's caching allocator to the device: freed blocks may not join."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def random_states(device: torch.device) -> tuple[torch.Tensor, ...]:
    """Returns the states of the random generators that a step draws from, so that the step can be repeated."""
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
