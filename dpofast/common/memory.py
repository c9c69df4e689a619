"""Peak memory of this process, in bytes."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

import torch

try:
    import resource
except ModuleNotFoundError:  # on Windows
    resource = None  # type: ignore[assignment]


def peak_memory() -> tuple[int, str]:
    """Peak bytes and what they are of: CUDA tensors ("GPU") where CUDA is in use, else resident memory ("RAM")."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated(), "GPU"
    return peak_resident(), "RAM"


def peak_resident() -> int:
    """Peak resident memory, in bytes."""
    try:
        # ru_maxrss would be the parent's where a process began as a copy of a larger one.
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    if resource is None:
        import psutil  # which accelerate needs

        return int(psutil.Process().memory_info().peak_wset)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident * (1 if sys.platform == "darwin" else 1024)


def restart_peak_resident() -> int:
    """Reset peak_resident to the memory that is resident now, and return that, in bytes (Linux).

    Freed memory that the C library still holds is returned to the system first: allocations in it would not raise the
    peak. After a model was freed that can hide all allocations of a step.

    Raises:
        RuntimeError: the system has no /proc/self/clear_refs that this process may write.
    """
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc; other C libraries do it by themselves
        libc.malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise RuntimeError(f"peak memory is measured through Linux's /proc/self/clear_refs: {error}") from error
    return peak_resident()
