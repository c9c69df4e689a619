"""Exact counts, on any device: floating-point operations of GEMMs, and the peak of live bytes.

    with Cost() as cost:
        loss = dpofast.linear_logprobs(hidden, weight, targets).logps.sum()
        loss.backward()
    cost.gemm_units(n, d, v)    GEMMs in units of 2·N·D·V
    cost.peak_bytes             most bytes alive at once, of what was made inside
    cost.peak_bytes_beyond(g)   the same without the storage of the tensors g: of returned gradients, say

A dispatch mode sees every operator that PyTorch runs, those of a backward pass and those inside a torch.library custom
op included. It does not see what a C++ operator or a Triton kernel allocates for itself, nor inside code made by
torch.compile (which runs uncompiled under any dispatch mode).
"""

import functools
import itertools
import math
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._library.custom_ops import _maybe_get_opdef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# Position of the left factor; the right one follows. Each name stands for all its overloads: out=, out_dtype.
# Matrix-vector products are row work: they read a matrix once, as an addition does.
_GEMMS = {
    aten.mm: 0,
    aten.bmm: 0,
    aten.addmm: 1,
    aten.addmm_: 1,
    aten._addmm_activation: 1,
    aten.addbmm: 1,
    aten.addbmm_: 1,
    aten.baddbmm: 1,
    aten.baddbmm_: 1,
}


class Cost(TorchDispatchMode):
    """Counts the GEMM work and the live bytes of the operators that run inside `with Cost() as cost:`.

    Storages are followed, not tensors: views of one storage count once, in-place work adds nothing, a freed storage
    leaves the count at once. A storage that an operator reads but that none made here existed before: an input.

    Attributes:
        gemms: how often a product (M, K)·(K, N) ran, by (M, K, N), over mm, bmm, addmm, baddbmm, addbmm and their
            in-place, out= and out_dtype forms; one of a batch counts as one.
        live_bytes: bytes allocated inside and still alive; stays correct after the region.
        peak_bytes: the most that live_bytes was inside the region.
    """

    def __init__(self, *, count_inputs: bool = False) -> None:
        """count_inputs: add the whole storage of every input to the bytes, from its first use on."""
        super().__init__()
        self.count_inputs = count_inputs
        self.gemms: Counter[tuple[int, int, int]] = Counter()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._storages: dict[int, _Storage] = {}
        # Every change of live_bytes in order, with the number of the storage it is due to.
        self._changes: list[tuple[int, int]] = []
        self._followed = 0

    def peak_bytes_beyond(self, *tensors: torch.Tensor) -> int:
        """peak_bytes had the storages of these tensors, which must be alive, counted nothing."""
        storages = (self._storages.get(tensor.untyped_storage()._cdata) for tensor in tensors)
        left_out = {storage.number for storage in storages if storage is not None}
        kept = (change for number, change in self._changes if number not in left_out)
        return max(itertools.accumulate(kept), default=0)

    @property
    def gemm_flops(self) -> int:
        """Σ 2·M·N·K over all products."""
        return sum(2 * math.prod(shape) * count for shape, count in self.gemms.items())

    def gemm_units(self, n: int, d: int, v: int) -> float:
        """gemm_flops in units of the head's product, 2·N·D·V."""
        return self.gemm_flops / (2 * n * d * v)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator and count it, or the operators that it consists of."""
        kwargs = kwargs or {}
        # torch.tensor(...) announces its new tensor as this operator's input.
        self._follow((args, kwargs), counted=self.count_inputs or func is aten.lift_fresh.default)
        parts = _parts(func, args)
        if parts is not None:
            # Differentiation has been recorded above a dispatch mode; here an operator only computes.
            with self, torch.no_grad():
                return parts(*args, **kwargs)
        result = func(*args, **kwargs)
        # Arguments again: out= may have grown.
        self._follow((result, args, kwargs), counted=True)
        self._ran(func, args, kwargs, result)
        return result

    def _ran(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Count a basic operator that ran."""
        if (product := gemm_shape(func, args)) is not None:
            shape, batch = product
            self.gemms[shape] += batch

    def _follow(self, tree: Any, *, counted: bool) -> None:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in self._storages:
                    self._followed += 1
                    alive = weakref.ref(storage, functools.partial(self._forget, key))
                    self._storages[key] = _Storage(self._followed, alive, counted)
                followed = self._storages[key]
                if followed.counted and followed.bytes != storage.nbytes():
                    self._change(followed, storage.nbytes())

    def _change(self, storage: "_Storage", now: int) -> None:
        self._changes.append((storage.number, now - storage.bytes))
        self.live_bytes += now - storage.bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        storage.bytes = now

    def _forget(self, key: int, _: Any) -> None:
        self._change(self._storages.pop(key), 0)


@dataclass
class _Storage:
    """A storage that is followed until it dies, and the bytes it adds to the count."""

    number: int
    alive: weakref.ref
    counted: bool
    bytes: int = 0


def gemm_shape(func: Any, args: tuple[Any, ...]) -> tuple[tuple[int, int, int], int] | None:
    """(M, K, N) and the batch of a matrix product; None for any other operator."""
    if (left := _GEMMS.get(func.overloadpacket)) is None:
        return None
    *batch, rows, inner = args[left].shape
    return (rows, inner, args[left + 1].shape[-1]), math.prod(batch)


def _parts(func: Any, args: tuple[Any, ...]) -> Callable[..., Any] | None:
    """What runs the operators that func consists of, where func is no basic operator; otherwise None."""
    if (custom := _maybe_get_opdef(func)) is not None:
        device = next((leaf.device.type for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)), None)
        kernels = custom._backend_fns
        return kernels.get(device) or kernels[None]
    # Operators without a kernel of their own come undivided under inference_mode.
    if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
        return func.decompose
    return None
