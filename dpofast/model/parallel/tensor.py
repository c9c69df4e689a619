"""Models whose layers transformers has split over ranks by a tp_plan (tensor parallelism), as the head needs them.

transformers sets a forward on each module of the plan, which moves inputs and outputs between ranks around the forward
of the module's class. That forward belongs to one module: it has to be made anew where the class is exchanged, and in
a copy, whose modules would otherwise compute with the weights of the original.

The gradients of norms between split layers (Qwen3's q_norm and k_norm) are sums over ranks. transformers sums a
parameter's gradient where it has been accumulated, which counts the former ones of several micro-batches once more for
each rank: here each backward's own is summed.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

_MADE_BY = "install_forward.<locals>.tp_forward"


class Split(NamedTuple):
    """How a module is split: style.install_forward(module, mesh) sets its forward."""

    style: Any
    mesh: Any

    def install(self, module: nn.Module) -> None:
        """Set the module's forward, around that of its class."""
        wanted = getattr(type(module), "split_style", None)
        style = getattr(self.style, "beneath", self.style)
        (style if wanted is None else wanted(style)).install_forward(module, self.mesh)


def tensor_parallel_size(model: Any) -> int:
    """Over how many ranks transformers has split the layers of a model; 1 for a whole one."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(base, "_tp_size", None) or 1


def split_of(module: nn.Module) -> Split | None:
    """How a module is split, where transformers has set its forward; None elsewhere."""
    function = vars(module).get("forward")
    if not getattr(function, "__qualname__", "").endswith(_MADE_BY):
        return None
    if (split := getattr(function, "split", None)) is not None:
        return split  # type: ignore[no-any-return]
    known = inspect.getclosurevars(function).nonlocals  # type: ignore[arg-type]
    if "self" in known:
        return Split(known["self"], known["mesh"])
    summed = inspect.getclosurevars(known["_all_reduce_grad"]).nonlocals
    return Split(_SummedGradients(), summed["mesh"])


def take_off_split(module: nn.Module) -> Split | None:
    """Delete the forward that split_of finds, and return how to set it again."""
    if (split := split_of(module)) is not None:
        del module.forward
    return split


def split_again(model: nn.Module) -> None:
    """Make the forwards of split modules anew: those of a copy, and of norms whose gradients are to be summed."""
    for module in model.modules():
        if (split := take_off_split(module)) is not None:
            split.install(module)


def deep_copy(model: Any) -> Any:
    """A deep copy of a model; a split one's has the same process groups, and no gradients.

    Raises:
        ValueError: FSDP2 shards the model between groups, which cannot be copied.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if tensor_parallel_size(model) == 1:
        return copy.deepcopy(model)
    if (base._fsdp_size or 1) > 1:
        raise ValueError(
            "precompute_ref_log_probs: expected True, or a ref_model, as a model that FSDP2 shards between groups of "
            "tensor_parallel_size processes cannot be copied for a reference in the step: give the model by name, or "
            "ref_model"
        )
    held = [value for name, value in vars(base).items() if name in ("_device_mesh", "_mesh_manager")]
    memo: dict[int, Any] = {id(value): value for value in held}
    for weight in model.parameters():
        if hasattr(weight, "device_mesh"):  # a DTensor has no deepcopy of its own (torch 2.13)
            memo[id(weight)] = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    return copy.deepcopy(model, memo)


class ComputesBeside:
    """The style of an LM head whose call may compute something else from its own rows than logits."""

    def __init__(self, beneath: Any) -> None:
        """beneath: the style that gives logits."""
        self.beneath = beneath

    def install_forward(self, module: Any, mesh: Any) -> None:
        """Set the module's forward; with compute=... it is that of its class, on hidden states as they are."""
        self.beneath.install_forward(module, mesh)
        logits = module.forward

        def tp_forward(*args: Any, compute: Any = None, **kwargs: Any) -> Any:
            if compute is None:
                return logits(*args, **kwargs)
            return type(module).forward(module, *args, compute=compute, **kwargs)

        tp_forward.split = Split(self, mesh)  # type: ignore[attr-defined]
        module.forward = tp_forward


class _SummedGradients:
    """The style of a module that is whole on every rank, whose gradients are parts of a sum over ranks."""

    def install_forward(self, module: Any, mesh: Any) -> None:
        """Set the module's forward."""

        def tp_forward(*args: Any, **kwargs: Any) -> Any:
            with _summed_parameters(module, mesh.get_group()):
                return type(module).forward(module, *args, **kwargs)

        tp_forward.split = Split(self, mesh)  # type: ignore[attr-defined]
        module.forward = tp_forward


@contextlib.contextmanager
def _summed_parameters(module: nn.Module, group: dist.ProcessGroup) -> Iterator[None]:
    """Inside, the module's own parameters are copies whose gradients are summed over the group."""
    own = dict(module._parameters)
    try:
        if torch.is_grad_enabled():
            for name, parameter in own.items():
                if parameter is not None and parameter.requires_grad:
                    module._parameters[name] = _Summed.apply(parameter, group)
        yield
    finally:
        module._parameters.update(own)


class _Summed(torch.autograd.Function):
    """x -> x; its gradient is summed over a group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None
