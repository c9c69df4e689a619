"""Reuses large CPU buffers from call to call, so that their pages need not be mapped and cleared again.

The C allocator maps a block of this size again for every call, and Linux zeroes each page on first access, which
takes a tenth of the time of a trained head. Here the last block of each use is kept. While it is unused it is marked
MADV_FREE: Linux reclaims its pages when it is short of memory, and leaves them in place otherwise.
"""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import threading
import weakref

import torch
from torch import Tensor
from torch.utils import deterministic

# Smaller blocks the allocator keeps by itself.
_LEAST_BYTES = 4 << 20


class Scratch:
    """Allocates uninitialized tensors for one purpose and reuses the memory of the last one that was freed.

    A second tensor that is alive at the same time gets memory of its own.
    """

    def __init__(self) -> None:
        """No memory yet."""
        self._idle: mmap.mmap | None = None
        self._lock = threading.RLock()  # a collection inside may end another lease

    def empty(self, shape: tuple[int, ...], *, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Allocate a contiguous tensor on `like`'s device; its memory is reused once no tensor uses it any more.

        Raises:
            MemoryError: there is none, on a CPU; torch.OutOfMemoryError on a GPU.
        """
        size = math.prod(shape) * dtype.itemsize
        if not like.is_cpu or size < _LEAST_BYTES or not hasattr(mmap, "MADV_FREE"):
            return like.new_empty(shape, dtype=dtype)
        block = self._take(size)
        # What the tensor holds on to, for as long as its storage lives.
        lease = (ctypes.c_ubyte * size).from_buffer(block)
        weakref.finalize(lease, self._put_back, block).atexit = False
        # lift_fresh: what watches operators sees a new tensor.
        tensor = torch.ops.aten.lift_fresh(torch.frombuffer(lease, dtype=dtype)).view(shape)
        if torch.are_deterministic_algorithms_enabled() and deterministic.fill_uninitialized_memory:  # type: ignore[attr-defined]
            tensor.fill_(torch.nan)  # as torch.empty does
        return tensor

    def _take(self, size: int) -> mmap.mmap:
        with self._lock:
            block, self._idle = self._idle, None
        if block is None or len(block) < size:
            del block  # before another is mapped
            try:
                return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            except OSError as error:
                if error.errno != errno.ENOMEM:
                    raise
                raise MemoryError(f"no memory for a buffer of {size:,} bytes") from error
        return block

    def _put_back(self, block: mmap.mmap) -> None:
        """Keep the larger of this block and the one that is idle already."""
        block.madvise(mmap.MADV_FREE)
        with self._lock:
            if self._idle is None or len(self._idle) < len(block):
                self._idle = block
