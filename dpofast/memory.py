"""Peak memory of this process."""

from __future__ import annotations

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
