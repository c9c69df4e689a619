"""What a GPU would be asked to do, without one: every kernel that a call launches, recorded on meta tensors.

    with traced() as trace:
        loss = dpofast.linear_preference_loss(hidden, ..., backend="triton").loss    # hidden and head on "meta"
        loss.backward()
    trace.launches          the operators of torch and the Triton kernels that a GPU would run, in order
    trace.peak_bytes        and whatever else bench/cost.py counts

The code that runs is the product's own: an operator of meta tensors computes shapes alone, and Triton's launches are
recorded in place of run. A meta tensor stands for one on a GPU (dpofast/head/planning/device.py).
"""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from bench.cost import Cost, gemm_shape

# Operators that allocate, or show a tensor in another way, and launch nothing.
_NO_KERNEL = {"empty", "new_empty", "empty_like", "new_empty_strided", "empty_strided", "lift_fresh", "_unsafe_view"}


@dataclass(frozen=True)
class Launch:
    """A kernel that a GPU would run, or a copy between it and the host.

    Attributes:
        name: the operator's or the Triton kernel's.
        bytes: read and written on the device, each tensor once.
        gemm: (M, K, N) of a matrix product, else None.
        accumulates: the product is added to what its result held.
    """

    name: str
    bytes: int
    gemm: tuple[int, int, int] | None = None
    accumulates: bool = False


class Trace(Cost):
    """Cost, and the launches that are due to meta tensors."""

    def __init__(self) -> None:
        """Nothing recorded yet."""
        super().__init__()
        self.launches: list[Launch] = []

    def named(self, name: str) -> list[Launch]:
        """The launches of one operator or Triton kernel."""
        return [launch for launch in self.launches if launch.name == name]

    @property
    def products(self) -> list[Launch]:
        """The matrix products, in order."""
        return [launch for launch in self.launches if launch.gemm is not None]

    def _ran(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        super()._ran(func, args, kwargs, result)
        if func.is_view or func.overloadpacket.__name__ in _NO_KERNEL:
            return
        name, product = func.overloadpacket.__name__, gemm_shape(func, args)
        if product is None:
            size = _device_bytes(args, kwargs.get("out"), result)
            if size is not None:
                self.launches.append(Launch(name, size))
            return
        accumulates = name.startswith("addmm")
        size = _device_bytes(args, result) or 0
        self.launches.append(Launch(name, size, product[0], accumulates))

    def launch(self, kernel: Any, arguments: tuple[Any, ...]) -> None:
        """Record a launch of a Triton kernel."""
        given = inspect.signature(kernel.fn).bind_partial(*arguments).arguments
        name, size = kernel.fn.__name__, 0
        if name in _AGAIN and given["flags_ptr"].storage_offset() > 0:
            self.launches.append(Launch(name, 0))
            return
        for argument, value in given.items():
            if isinstance(value, Tensor):
                moves = _MOVES.get(name, {}).get(argument)
                size += _bytes(value) * (1 if moves is None else moves(given))
        columns = _COLUMNS.get(name)
        self.launches.append(Launch(name, size, (given["N"], given["D"], given[columns]) if columns else None))


# How often a kernel moves an argument where that is not once.
_MOVES: dict[str, dict[str, Callable[[dict[str, Any]], int]]] = {
    # E in the place of the logits needs their maximum first: the row is read twice.
    "_token_logprobs_kernel": {"logits_ptr": lambda given: 1 if given["exp_ptr"] is None else 2},
    # A row's target entry of E; where a few columns are sampled, those and the rows of the targets.
    "patch_kernel": {"exp_ptr": lambda given: 0},
    "guess_kernel": {"weight_ptr": lambda given: 0},
    # By 1, as backward from a loss does: it writes nothing.
    "_scale_kernel": {"values_ptr": lambda given: 0},
}


# Products inside of a kernel: the argument that is their number of columns.
_COLUMNS = {"_exp_gemm_kernel": "V", "guess_kernel": "samples"}
# They end at once where no row is flagged (kernels/exp_gemm.py), as in a run whose guesses are good.
_AGAIN = ("_exp_gemm_kernel", "patch_kernel", "linear_lse_kernel", "reshift_kernel")


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _device_bytes(*tree: Any) -> int | None:
    """Bytes of the meta tensors, each once; None where there is none."""
    found = {id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_meta}
    return sum(map(_bytes, found.values())) if found else None


@contextlib.contextmanager
def traced() -> Iterator[Trace]:
    """Record what runs inside; Triton kernels are not run."""
    trace = Trace()

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        trace.launch(kernel, arguments)

    with contextlib.ExitStack() as stack:
        # Whether kernels are compiled or interpreted in this process.
        for kind in (JITFunction, InterpretedFunction):
            stack.enter_context(mock.patch.object(kind, "run", run))
        # A launch makes its tensors' device current, as torch.cuda.device does.
        current = types.SimpleNamespace(device=lambda _: contextlib.nullcontext())
        stack.enter_context(mock.patch.object(torch, "meta", current, create=True))
        # There is no autocast of meta tensors.
        stack.enter_context(mock.patch.object(torch, "is_autocast_enabled", lambda *_: False))
        stack.enter_context(mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext()))
        stack.enter_context(trace)
        yield trace
