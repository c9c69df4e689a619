"""fuse_lora: PEFT's LoRA linear layers with fewer passes over memory; equal to PEFT's up to rounding.

A layer computes y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ (arXiv 2106.09685). The products with A and B are small, but PEFT's separate
operations read and write arrays of the size of y and x several times: to scale, to add, and to accumulate gradients.
Here both products are accumulated into the output of W's product (addmm): beside W's own passes, the forward makes 2
over y instead of 6, and the backward 2 over y and 3 over x instead of 4 and 5.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpofast.common.autograd import ReverseModeFunction, check_derivatives


def fuse_lora(model: nn.Module) -> int:
    """Make LoRA layers over nn.Linear compute the formula above in one autograd function. Returns how many they are.

    A layer still runs PEFT's forward wherever there is more to compute than the formula: dropout, DoRA and other
    variants, several or merged or disabled adapters, a bias of the adapter, weights of several dtypes, submodules with
    hooks or a forward of their own (ZeRO-3, offloading), and inside torch.compile. The fused function has first
    derivatives only, no torch.func transforms, and hooks on all modules see the layer but not its submodules.
    """
    layers = [module for module in model.modules() if type(module) is Linear and type(module.base_layer) is nn.Linear]
    for layer in layers:
        layer.__class__ = FusedLoraLinear
    return sum(isinstance(module, FusedLoraLinear) for module in model.modules())


class FusedLoraLinear(Linear):
    """PEFT's LoRA layer with a fused forward; parameters and their names are unchanged."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        # A compiler fuses PEFT's own formula; the function below would split the graph, as it refuses forward mode.
        plain = args or kwargs or torch.compiler.is_compiling()
        adapter = None if plain else self._only_adapter()
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        base: Any = self.base_layer
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        tensors: list[Any] = [x, base.weight, base.bias, a, b]
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            tensors = [t if t is None or t.dtype is torch.float64 else t.to(dtype) for t in tensors]
        if len({t.dtype for t in tensors if t is not None}) > 1:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            rows = tensors[0].reshape(-1, x.shape[-1])
            check_derivatives(rows, *tensors[1:])
            y = _LoraLinear.apply(rows, *tensors[1:], self.scaling[adapter])
        return y.view(*x.shape[:-1], base.out_features)

    def _only_adapter(self) -> str | None:
        """The adapter's name, where one is active and the layer is the formula above."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or self.disable_adapters or self.merged or self.fan_in_fan_out:
            return None
        (name,) = active
        dropout, parts = self.lora_dropout[name], (self.base_layer, self.lora_A[name], self.lora_B[name])
        dropped = self.training and getattr(dropout, "p", 0.0) > 0
        special = (
            name in self.lora_variant or self.lora_B[name].bias is not None or type(self.base_layer) is not nn.Linear
        )
        return None if dropped or special or any(map(_hooked, parts)) else name


def _hooked(module: nn.Module) -> bool:
    """Whether hooks or a forward set on the module must run: ZeRO-3 and offloading load weights in them."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


class _LoraLinear(ReverseModeFunction):
    """(N, I), W (O, I), b (O,) or None, A (R, I), B (O, R), s -> (N, O)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        low = x @ a.t()
        y = F.linear(x, weight, bias)
        torch.addmm(y, low, b.t(), alpha=scaling, out=y)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scaling = scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad_low = (grad @ b).mul_(ctx.scaling)
        dx = dw = dbias = da = db = None
        if needs[0]:
            dx = grad @ weight
            torch.addmm(dx, grad_low, a, out=dx)
        if needs[1]:
            dw = grad.t() @ x
        if needs[2]:
            dbias = grad.sum(0)
        if needs[3]:
            da = grad_low.t() @ x
        if needs[4]:
            db = (grad.t() @ low).mul_(ctx.scaling)
        return dx, dw, dbias, da, db, None
