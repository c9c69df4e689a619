"""What the plan of a head must know of the device that it runs on."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class HeadDevice:
    """A device as plans see it.

    Attributes:
        kind: "cpu", "cuda" (ROCm too) or what else torch calls it.
        multiprocessors: of a GPU; 0 where they are not known.
        memory_bytes: of a GPU; 0 where they are not known.
    """

    kind: str
    multiprocessors: int = 0
    memory_bytes: int = 0

    @property
    def widens(self) -> bool:
        """Whether its products of 16-bit factors write float32 themselves (torch.mm's out_dtype)."""
        return self.kind == "cuda"


# What a tensor on "meta" stands for, so that plans are made and their work counted without a GPU: an H100.
META = HeadDevice("cuda", multiprocessors=132, memory_bytes=80 << 30)


def head_device(device: torch.device) -> HeadDevice:
    """The device of a call's tensors."""
    if device.type == "meta":
        return META
    return _cuda(device) if device.type == "cuda" else HeadDevice(device.type)


@functools.cache
def _cuda(device: torch.device) -> HeadDevice:
    properties = torch.cuda.get_device_properties(device)
    return HeadDevice("cuda", properties.multi_processor_count, properties.total_memory)
