"""Models that ZeRO-3 has partitioned run without DeepSpeed's engine: each layer's weights are gathered in its forward.

The engine gathers in hooks of its own, from the first step on. Before that (the parity check, reference log-probs,
evaluation), and for a reference model, which gets no engine, the hooks of gather_in_forwards() do: a decoder layer's
weights are gathered when it is called and freed when it returns, so a process holds its share of the model and one
layer. Every forward is then a collective: all processes must run equally many, without gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dpofast.checkpointing.zero import is_partitioned, whole
from dpofast.model.parts import named_layers
from dpofast.model.wrappers import drop_hooks


def partition(model: nn.Module, config: dict[str, Any], dtype: torch.dtype | None) -> None:
    """Partition a model's weights over all processes, in place, as the first process has them. A collective.

    Args:
        model: whole in every process; weights that are partitioned already stay as they are.
        config: DeepSpeed's, of a run with ZeRO-3: it says where the shares lie.
        dtype: floating-point weights are converted to it first, as DeepSpeed does in training; None leaves them.
    """
    from deepspeed import comm, zero

    if not comm.is_initialized():  # its world would be one process
        comm.init_distributed(dist_backend=torch.distributed.get_backend())
    for weight in model.parameters():
        if dtype is not None and weight.is_floating_point():
            weight.data = weight.data.to(dtype)
    zero.Init(module=model, config_dict_or_path=config)


def gather_in_forwards(model: Any) -> None:
    """Let a partitioned model gather each layer's weights while the layer runs, until stop_gathering()."""
    for module, weights in _units(model):
        _Unit(module, weights)


def stop_gathering(model: nn.Module) -> None:
    """Undo gather_in_forwards()."""
    drop_hooks(model, _is_ours)


@contextlib.contextmanager
def gathered_forwards(model: Any) -> Iterator[None]:
    """Inside, a partitioned model can be called, as after gather_in_forwards().

    Nothing is done for a whole model, nor for one that gathers already, by these hooks or by DeepSpeed's engine.
    """
    if not is_partitioned(model) or _gathers(model):
        yield
        return
    gather_in_forwards(model)
    try:
        yield
    finally:
        stop_gathering(model)


class _Unit:
    """Gathers some weights when a module is called, and frees them when it returns or raises."""

    def __init__(self, module: nn.Module, weights: list[nn.Parameter]) -> None:
        self._weights = weights
        self._calls: list[contextlib.AbstractContextManager[None]] = []  # a module may be called inside its own call
        module.register_forward_pre_hook(self.gather, prepend=True)
        module.register_forward_hook(self.free, always_call=True)

    def gather(self, module: nn.Module, args: Any) -> None:
        call = whole(*self._weights)
        call.__enter__()
        self._calls.append(call)

    def free(self, module: nn.Module, args: Any, output: Any) -> None:
        self._calls.pop().__exit__(None, None, None)


def _units(model: Any) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """What is gathered at once: each decoder layer, and the own weights of every module outside of them."""
    layers = named_layers(model)
    inside: set[int] = set()
    for module in model.modules():  # parents first, and one that several places share once
        if id(module) in inside:
            continue
        is_layer = type(module).__name__ in layers
        if is_layer:
            inside.update(map(id, module.modules()))
        if weights := [weight for weight in module.parameters(recurse=is_layer) if hasattr(weight, "ds_id")]:
            yield module, weights


def _is_ours(hook: Any) -> bool:
    return isinstance(getattr(hook, "__self__", None), _Unit)


def _gathers(model: nn.Module) -> bool:
    """Whether the hooks of gather_in_forwards() or those of DeepSpeed's engine are on the model."""
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    return any(_is_ours(hook) or getattr(hook, "__module__", "").startswith("deepspeed.") for hook in hooks)
