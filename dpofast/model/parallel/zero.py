"""Weights that DeepSpeed's ZeRO-3 has partitioned: made so, gathered around each layer's forward, and read whole.

DeepSpeed gathers partitioned weights in the hooks of its engine, which exists from the first step on. Before that (the
parity check, reference log-probs, evaluation) and for a reference model, which has no engine, gathered_forwards() does:
a decoder layer's weights are gathered when it is called and freed when it returns, so a rank holds its share of the
model and one layer. Every forward is then a collective: all processes must run equally many.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dpofast.model.parts import base_causal_lm


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 has partitioned some of a model's weights."""
    return any(hasattr(weight, "ds_id") for weight in model.parameters())


def partition(model: nn.Module, config: dict[str, Any], dtype: torch.dtype | None) -> None:
    """Partition a model's weights over all processes, in place, as the first has them. A collective.

    Args:
        model: whole in every process; weights that are partitioned already stay as they are.
        config: DeepSpeed's, of a run with ZeRO-3: it says where the shares lie.
        dtype: floating-point weights are converted to it first, as DeepSpeed does in training; None leaves them.
    """
    from deepspeed import zero

    for weight in model.parameters():
        if dtype is not None and weight.is_floating_point():
            weight.data = weight.data.to(dtype)
    zero.Init(module=model, config_dict_or_path=config)


def whole_shape(weight: Tensor) -> torch.Size:
    """The shape of a weight, whether it is partitioned (which leaves an empty tensor) or not."""
    shape: torch.Size = getattr(weight, "ds_shape", weight.shape)
    return shape


@contextlib.contextmanager
def whole(*weights: Tensor) -> Iterator[None]:
    """Inside, these weights are whole in every process; they must not be changed. A collective where partitioned."""
    absent = [weight for weight in weights if _is_absent(weight)]
    if not absent:
        yield
        return
    from deepspeed import zero

    # the parity check widens what torch's functions get
    with contextlib.ExitStack() as gathered:
        with torch._C.DisableTorchFunction():
            gathered.enter_context(zero.GatheredParameters(absent))
        try:
            yield
        finally:
            with torch._C.DisableTorchFunction():
                gathered.close()


@contextlib.contextmanager
def gathered_forwards(model: Any) -> Iterator[None]:
    """Inside, a partitioned model can be called: each layer's weights are gathered while it runs, without gradients.

    Nothing is done for a whole model, nor for one that DeepSpeed's engine runs, which gathers by itself. A collective.
    """
    if not is_partitioned(model) or _has_engine(model):
        yield
        return
    units = [_Unit(module, weights) for module, weights in _units(model)]
    try:
        yield
    finally:
        for unit in units:
            unit.remove()


class _Unit:
    """Gathers some weights when a module is called, and frees them when it returns or raises."""

    def __init__(self, module: nn.Module, weights: list[nn.Parameter]) -> None:
        self._weights = weights
        self._calls: list[contextlib.AbstractContextManager[None]] = []  # a module may be called inside its own call
        self._hooks = (
            module.register_forward_pre_hook(self._gather, prepend=True),
            module.register_forward_hook(self._free, always_call=True),
        )

    def _gather(self, module: nn.Module, args: Any) -> None:
        call = whole(*self._weights)
        call.__enter__()
        self._calls.append(call)

    def _free(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._calls:
            self._calls.pop().__exit__(None, None, None)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        while self._calls:
            self._calls.pop().__exit__(None, None, None)


def _units(model: Any) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """What is gathered at once: each decoder layer, and the own weights of every module outside of them."""
    base = base_causal_lm(model)
    layers = set(getattr(base, "_no_split_modules", None) or ())

    def walk(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
        is_layer = type(module).__name__ in layers
        if weights := [w for w in module.parameters(recurse=is_layer) if hasattr(w, "ds_id")]:
            yield module, weights
        if not is_layer:
            for child in module.children():
                yield from walk(child)

    seen: set[int] = set()
    for module, weights in walk(model):
        if id(module) not in seen:  # a layer that several places share
            seen.add(id(module))
            yield module, weights


def _is_absent(weight: Tensor) -> bool:
    return hasattr(weight, "ds_id") and weight.ds_status.name == "NOT_AVAILABLE"  # type: ignore[attr-defined]


def _has_engine(model: nn.Module) -> bool:
    """Whether the hooks of DeepSpeed's engine are on the model."""
    return any(
        getattr(hook, "__module__", "").startswith("deepspeed.")
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
    )
