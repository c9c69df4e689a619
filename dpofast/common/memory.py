"""Peak memory of this process."""

from __future__ import annotations

import ctypes
import re
import resource
import sys
from pathlib import Path

import torch


def peak_memory() -> tuple[int, str]:
    """Bytes, and of what: on CUDA the most that tensors held ("GPU"), else the most that was resident ("RAM")."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated(), "GPU"
    return peak_resident(), "RAM"


def peak_resident() -> int:
    """Bytes: the most that was resident."""
    try:
        # ru_maxrss would be the parent's where a process began as a copy of a larger one.
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident * (1 if sys.platform == "darwin" else 1024)


def restart_peak_resident() -> int:
    """Lower peak_resident to what is resident now, and return that, in bytes (Linux).

    Memory that the C library keeps after it was freed is given back first: what is allocated in it would otherwise not
    be seen. Between 16 MB blocks of a model that is gone this can be all of a step.

    Raises:
        RuntimeError: the system has no /proc/self/clear_refs that this process may write.
    """
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc; others give back as they go
        libc.malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise RuntimeError(f"peak memory is measured through Linux's /proc/self/clear_refs: {error}") from error
    return peak_resident()
