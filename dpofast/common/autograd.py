"""Reverse-mode first derivatives alone: any other derivative raises instead of being wrong.

torch's own once_differentiable raises only where the incoming gradient requires grad. For
loss.backward(create_graph=True) it does not, and a gradient penalty would treat our gradient as a constant. A
torch.library operator drops the tangents of forward mode without a word. The transforms of torch.func would need a
backward of another form.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

_Backward = Callable[..., tuple[Tensor | None, ...]]


def no_second_derivative(ctx: Any, *_: Any) -> Any:
    """Raise RuntimeError: the backward of gradients that cannot be differentiated again."""
    raise RuntimeError(
        "dpofast's log-probs have first derivatives only: use the 'reference' backend where a gradient is "
        "differentiated again (a gradient penalty, a Hessian)"
    )


def check_derivatives(*tensors: Tensor | None) -> None:
    """Check the inputs of an operator or of a ReverseModeFunction, before it is called.

    Raises:
        RuntimeError: one carries a tangent of forward mode (jvp, jacfwd), or is differentiated by a transform of
            torch.func (grad, vjp, jacrev). torch.func.vmap alone has a fallback for operators.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in given):
        _refuse_forward_mode()
    if not torch.compiler.is_compiling() and any(map(_is_transformed, given)):
        _refuse_transforms()


def _is_transformed(tensor: Tensor) -> bool:
    """Whether a transform of torch.func differentiates the tensor, at any level."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_gradtrackingtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return False


def _refuse_transforms() -> None:
    raise RuntimeError(
        "dpofast's log-probs have no torch.func transforms (grad, vjp, jacrev): use torch.autograd (backward, "
        "torch.autograd.grad, torch.autograd.functional), or the 'reference' backend"
    )


def _refuse_forward_mode(ctx: Any = None, *_: Any) -> Any:
    raise RuntimeError(
        "dpofast's log-probs have no forward-mode derivatives (jvp, jacfwd, make_dual): use reverse mode (backward, "
        "torch.autograd.grad), or the 'reference' backend"
    )


class ReverseModeFunction(torch.autograd.Function):
    """Base of autograd functions with a backward alone; check_derivatives stands before each call."""

    jvp = staticmethod(_refuse_forward_mode)


class _Constant(ReverseModeFunction):
    """(gradient, *what it depends on) -> gradient; raises when differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        no_second_derivative(ctx)


def first_order_only(backward: _Backward) -> _Backward:
    """Decorate the backward of an autograd.Function, which must save the tensors that its gradients depend on.

    The decorated backward returns gradients that raise RuntimeError when they are differentiated.
    """

    @functools.wraps(backward)
    def guarded(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():  # no create_graph: there is no second derivative
            return backward(ctx, *upstream)
        sources = [t for t in (*upstream, *ctx.saved_tensors) if t is not None and t.requires_grad]
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        return tuple(None if gradient is None else _Constant.apply(gradient, *sources) for gradient in gradients)

    return guarded


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Enable autograd inside, also in the body of a torch.library operator, where a dispatch key switches it off.

    For a derivative that is taken inside the block; tensors that leave it must be detached.
    """
    with torch.inference_mode(False):
        include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
        recorded = exclude.remove(torch._C.DispatchKey.AutogradFunctionality)
        with torch._C._ForceDispatchKeyGuard(include, recorded), torch.enable_grad():
            yield
