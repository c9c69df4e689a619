"""Tensors that say they are on a GPU and lie on the CPU, to see where a device path would make its host wait.

Inside counting_syncs() whatever is made on or moved to "cuda" is an AsCuda tensor, and so is every result of one: the
choices that dpofast makes by device are those of CUDA, and kernels run in Triton's interpreter. Noted is what waits:
values that the host reads (item, tolist, bool, a shape that depends on values), and copies between host and device that
block.
"""

import contextlib
import traceback
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.interpreter import GridExecutor

CUDA = torch.device("cuda", 0)
ROOT = Path(__file__).resolve().parents[2]
READS = "item tolist numpy __bool__ __int__ __float__ __index__ nonzero masked_select equal unique bincount argwhere"
_READS = {f"torch.Tensor.{name}" for name in READS.split()} | {f"torch.{name}" for name in READS.split()}


class AsCuda(torch.Tensor):
    """A tensor on the CPU that says it is on CUDA."""

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)


class CountingSyncs(TorchFunctionMode):
    """Attributes: syncs, the waits so far, as "file:line function"; launched, names of the kernels."""

    def __init__(self):
        super().__init__()
        self.syncs, self.launched = [], []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = resolve_name(func) or getattr(func, "__name__", str(func))
        from_cuda = any(isinstance(leaf, AsCuda) for leaf in tree_leaves((args, kwargs)))
        first = args[0] if args else None
        if name in _READS and isinstance(first, AsCuda):
            self.wait(name)
        if name.rpartition(".")[2] in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, AsCuda) and part.dtype == torch.bool for part in index):
                self.wait(name)
        if name == "torch.Tensor.repeat_interleave" and from_cuda and kwargs.get("output_size") is None:
            self.wait(name)
        devices = [leaf for leaf in tree_leaves((args[1:], kwargs)) if isinstance(leaf, torch.device)]
        devices += [torch.device(leaf) for leaf in (*args[1:], kwargs.get("device")) if leaf in ("cuda", "cpu")]
        if name == "torch.Tensor.cpu":
            devices = [torch.device("cpu")]
        if name == "torch.Tensor.to" and len(args) > 1 and isinstance(args[1], torch.Tensor):
            devices = [args[1].device]
        target = devices[0].type if devices else None
        if isinstance(first, torch.Tensor) and name in ("torch.Tensor.to", "torch.Tensor.cpu") and target is not None:
            blocks = not kwargs.get("non_blocking", False)
            if blocks and (target == "cuda") != isinstance(first, AsCuda):
                self.wait(name)
        if name == "torch.Tensor.copy_" and isinstance(args[1], AsCuda) != isinstance(first, AsCuda):
            if not kwargs.get("non_blocking", len(args) > 2 and args[2]):
                self.wait(name)
        if name in ("torch.tensor", "torch.as_tensor") and target == "cuda":
            self.wait(name)  # from pageable memory, and the host waits for it
        if target == "cuda":
            there = lambda leaf: torch.device("cpu") if isinstance(leaf, torch.device) or leaf == "cuda" else leaf  # noqa: E731
            args, kwargs = tree_map(there, args), tree_map(there, kwargs)
        with self if name.startswith("torch.ops.dpofast") else contextlib.nullcontext():
            result = func(*args, **kwargs)
        on_cuda = from_cuda if target is None else target == "cuda"
        kind = AsCuda if on_cuda else torch.Tensor
        return tree_map(
            lambda leaf: (
                leaf.as_subclass(kind) if type(leaf) in (AsCuda, torch.Tensor) and type(leaf) is not kind else leaf
            ),
            result,
        )

    def wait(self, name):
        own = [frame for frame in traceback.extract_stack() if "/dpofast/" in frame.filename]
        place = f"{own[-1].filename.rpartition('/dpofast/')[2]}:{own[-1].lineno}" if own else "?"
        self.syncs.append(f"{place} {name.rpartition('.')[2]}")


@contextlib.contextmanager
def counting_syncs():
    """Yields a CountingSyncs; what is made on "cuda" inside is AsCuda."""
    launch, counting = GridExecutor.__call__, CountingSyncs()

    def interpreted(self, *args, **kwargs):
        counting.launched.append(self.fn.__name__)
        with torch._C.DisableTorchFunction():
            return launch(self, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(GridExecutor, "__call__", interpreted))
        stack.enter_context(mock.patch("torch.cuda.device", lambda *_: contextlib.nullcontext()))
        properties = SimpleNamespace(multi_processor_count=132, total_memory=80 << 30, major=9, minor=0, name="H100")
        stack.enter_context(mock.patch("torch.cuda.get_device_properties", lambda *_: properties))
        stack.enter_context(mock.patch("torch.cuda.get_device_capability", lambda *_: (9, 0)))
        stack.enter_context(mock.patch("torch.cuda.get_rng_state", lambda *_: torch.empty(0)))
        for caller in ("linear_preference", "linear_logprobs"):  # it refuses other classes
            stack.enter_context(mock.patch(f"dpofast.head.{caller}.check_head"))
        yield stack.enter_context(counting)


def move(model):
    """Move a model's parameters and buffers to "cuda", in place."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                moved = parameter.data.as_subclass(AsCuda).requires_grad_(parameter.requires_grad)
                moved._is_param = True  # what makes a tensor of another class a Parameter
                module._parameters[name] = moved
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.as_subclass(AsCuda)
