"""activation_offloading: what gradient checkpointing keeps of a forward waits for the backward in the CPU's memory.

With gradient checkpointing each decoder layer keeps its input, (T, D), and computes the rest again in the backward. Of
128K positions of a 70B model (D = 8192, 80 layers) the inputs are 160 GiB in bfloat16; on the CPU they are page-locked
and copied back one by one as the backward comes to them. The LM head, which keeps its weight and the rows that predict
targets, and all parameters stay on the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dpofast.model.parts import backbone_of, base_causal_lm
from dpofast.training.config import DPOConfig


class SavedOnCpu(saved_tensors_hooks):
    """Inside, tensors that autograd saves are copied to the CPU, and back to their device in the backward.

    torch.autograd.graph.save_on_cpu, but for parameters, which are on the device anyway.

    Args:
        pin_memory: copy to page-locked memory: faster, and it does not wait on the way back.
    """

    def __init__(self, pin_memory: bool) -> None:
        """Copy nothing yet."""
        self.num_bytes = 0
        on_cpu: Any = torch.autograd.graph.save_on_cpu(pin_memory)

        def pack(tensor: Tensor) -> Any:
            if isinstance(tensor, nn.Parameter):
                return tensor
            self.num_bytes += tensor.nbytes
            return on_cpu.pack_hook(tensor)

        def unpack(packed: Any) -> Tensor:
            return packed if isinstance(packed, Tensor) else on_cpu.unpack_hook(packed)

        super().__init__(pack, unpack)


class _Offloading:
    """Forward hooks on a backbone: inside its forward, in training, tensors are saved on the CPU."""

    def __init__(self, pin_memory: bool) -> None:
        self._pin_memory = pin_memory
        self._inside: list[SavedOnCpu] = []
        self.last_bytes = 0  # copied by the last forward

    def enter(self, module: nn.Module, inputs: Any) -> None:
        """Before the backbone's forward."""
        self._inside.append(SavedOnCpu(self._pin_memory))
        self._inside[-1].__enter__()

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """After it, also after an error."""
        if self._inside:
            ended = self._inside.pop()
            ended.__exit__(None, None, None)
            self.last_bytes = ended.num_bytes


@contextlib.contextmanager
def offloaded_activations(model: Any, args: DPOConfig) -> Iterator[_Offloading | None]:
    """Inside, the model's backbone saves on the CPU what it keeps for the backward, where args say so."""
    if not args.activation_offloading:
        yield None
        return
    offloading = _Offloading(pin_memory=args.device.type == "cuda")
    backbone = backbone_of(base_causal_lm(model))
    handles = [
        backbone.register_forward_pre_hook(offloading.enter),
        backbone.register_forward_hook(offloading.leave, always_call=True),
    ]
    try:
        yield offloading
    finally:
        for handle in handles:
            handle.remove()
