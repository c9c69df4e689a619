"""Exact counts on one rank: bytes saved for the backward, bytes of weights, and what ranks exchange.

Only storages count, each once however many tensors view it, and of a DTensor only this rank's part.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators of c10d and _c10d_functional by a part of their names, and how much of a tensor's bytes (k ranks, the whole
# tensor) at least leaves each rank: (k - 1) / k times this.
_KINDS = {
    "reduce_scatter": ("reduce-scatter", 1),
    "allgather": ("all-gather", 1),
    "all_gather": ("all-gather", 1),
    "allreduce": ("all-reduce", 2),
    "all_reduce": ("all-reduce", 2),
    "alltoall": ("all-to-all", 1),
    "all_to_all": ("all-to-all", 1),
    "broadcast": ("broadcast", 1),
}


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of the storages of this rank's part of tensors, by an identity that is theirs while they live."""
    found = (_local(tensor).untyped_storage() for tensor in tensors)
    return {storage._cdata: storage.nbytes() for storage in found}


def _local(tensor: Tensor) -> Tensor:
    return getattr(tensor, "_local_tensor", tensor)


def size(tensors: Iterable[Tensor]) -> int:
    """Their bytes together."""
    return sum(storages(tensors).values())


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors of nested dicts and lists, such as an optimizer's state."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _Kept:
    """A tensor that autograd saved, alive until its backward has run."""

    def __init__(self, saved: "Saved", tensor: Tensor) -> None:
        self.saved, self.tensor = saved, tensor.detach()  # a node would keep itself alive through its own result
        ((self.key, size),) = storages([tensor]).items()
        saved.add(self.key, size)

    def __del__(self) -> None:
        self.saved.remove(self.key)


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Inside `with Saved(model) as saved:`, counts what a forward keeps for its backward, and gathered weights.

    Attributes:
        peak: the most bytes that were saved at a time, of storages that no weight of the model has.
        gathered: the most bytes that the model's weights had beyond those of `resident()`.
    """

    def __init__(self, model: nn.Module) -> None:
        """Count for a model; resident() must be called before its first step."""
        super().__init__(self._pack, self._unpack)
        self._model = model
        self._alive: dict[int, list[int]] = {}  # bytes and how often they are saved
        self._shares: set[int] = set()
        self.peak = self.gathered = 0

    def __enter__(self) -> "Saved":
        """Begin to count."""
        self._hook = nn.modules.module.register_module_forward_pre_hook(lambda *_: self._weights() and None)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop."""
        super().__exit__(*error)
        self._hook.remove()

    def resident(self) -> int:
        """Bytes of the weights between steps, which stay while others are gathered.

        Of the tensors: on a CPU a shard that transformers loads may be a view of the whole tensor, not on a GPU.
        """
        weights = list(self._model.parameters())
        self._shares = set(storages(weights))
        local = {part.data_ptr(): part.nbytes for part in map(_local, weights)}
        return sum(local.values())

    def add(self, key: int, size: int) -> None:
        """Count a storage that is saved once more."""
        self._alive.setdefault(key, [size, 0])[1] += 1
        self.peak = max(self.peak, sum(size for size, _ in self._alive.values()))

    def remove(self, key: int) -> None:
        """One that is saved once less."""
        self._alive[key][1] -= 1
        if not self._alive[key][1]:
            del self._alive[key]

    def _weights(self) -> dict[int, int]:
        found = storages(self._model.parameters())
        self.gathered = max(self.gathered, sum(size for key, size in found.items() if key not in self._shares))
        return found

    def _pack(self, tensor: Tensor) -> Any:
        return tensor.detach() if storages([tensor]).keys() & self._weights().keys() else _Kept(self, tensor)

    def _unpack(self, kept: Any) -> Tensor:
        self._weights()
        return kept.tensor if isinstance(kept, _Kept) else kept


class Collectives(TorchDispatchMode):
    """Counts what this rank exchanges inside `with Collectives() as exchanged:`.

    Attributes:
        calls: how often each kind of collective ran, with "numbers" for those of counts and losses on the CPU, which
            are float64, integers or pickled bytes; a model's tensors are float32 here.
        bytes: the size of the whole tensor of each call (all ranks' parts together), summed by kind.
        sent: of these, the least that must leave this rank.
    """

    def __init__(self) -> None:
        """Start at zero."""
        super().__init__()
        self.clear()

    def clear(self) -> None:
        """Forget what was counted."""
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()

    def figures(self) -> dict[str, dict[str, float]]:
        """Calls, bytes and sent bytes by kind."""
        return {
            kind: {"calls": self.calls[kind], "bytes": self.bytes[kind], "sent": round(self.sent[kind])}
            for kind in sorted(self.calls)
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run an operator, and count it where it is a collective."""
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            found = [row for part, row in _KINDS.items() if part in func.__name__]
            if found:
                self._count(*found[0], args, result)
        return result

    def _count(self, kind: str, times: int, args: tuple[Any, ...], result: Any) -> None:
        parts = [tensors_in(part) for part in (*args, *(result if isinstance(result, tuple) else (result,)))]
        whole = max(sum(tensor.nbytes for tensor in part) for part in parts)
        ranks = _ranks_of(args)
        if not any(tensor.dtype == torch.float32 for part in parts for tensor in part):
            kind = "numbers"
        self.calls[kind] += 1
        self.bytes[kind] += whole
        self.sent[kind] += whole * times * (ranks - 1) / ranks


def _ranks_of(args: tuple[Any, ...]) -> int:
    """The size of the group among a collective's arguments: a ProcessGroup, or the name of one."""
    for argument in args:
        if isinstance(argument, torch.ScriptObject):
            try:
                return ProcessGroup.unbox(argument).size()
            except RuntimeError:  # a reduction's kind
                continue
        if isinstance(argument, str) and argument not in ("sum", "avg", "max", "min"):
            return _resolve_process_group(argument).size()
    raise AssertionError("a collective without a group")
