"""Vocabulary-parallel log-probs: what the ranks of a process group agree on before any of them computes, and autograd.

A rank that raised alone would leave the others waiting for its share of the next exchange. So every check ends in one
all-gather of a few integers, after which all ranks go on or all raise. The computation is in engine/sharded_engine.py.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpofast.common.autograd import ReverseModeFunction, check_derivatives, first_order_only
from dpofast.common.backend import choose_backend
from dpofast.head.engine import passes
from dpofast.head.engine.interface import HeadInputs, KeptRows, Needs, RowSums, row_coefficients
from dpofast.head.engine.sharded_engine import ShardedEngine, VocabShard
from dpofast.head.options import LogitOptions
from dpofast.head.planning.device import head_device
from dpofast.head.planning.plan import default_logits_bytes
from dpofast.head.validate import check_head, check_target_values

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_OPTIONS = "temperature, logit_scale, softcap, ignore_index, stats"


def vocab_parallel_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    options: LogitOptions,
    process_group: dist.ProcessGroup,
    backend: str,
    max_logits_bytes: int | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs of targets where rank r of process_group holds rows [V_0 + … + V_{r−1}, … + V_r) of the head.

    A collective: every rank of the group calls it, and runs backward, in the same order. Forward waits for the device
    once, to compare the arguments of all ranks, and breaks torch.compile's graph there. The gradient that reaches logps
    must be the same on all ranks, and hidden's gradient is then the whole one on each of them; weight and bias get the
    gradient of their own rows.

    Args:
        hidden: (N, D), the same on every rank (not checked: a rank's own values would give a wrong result).
        weight: (V_r, D), this rank's rows, in hidden's dtype; V_r may differ between ranks and may be 0.
        targets: (N,) int64, ids of the whole vocabulary, the same on every rank (checked).
        bias: (V_r,), or None on every rank.
        options: the same on every rank; all statistics are available.
        process_group: its rank order is the order of the shards.
        backend: "auto", "triton" or "torch".
        max_logits_bytes: room for logits on each rank, or None for the default; the least of all ranks counts.

    Returns:
        Log-probs (N,) float32 (float64 for float64 inputs), nats, differentiable, and the statistics that options
        name, (N,) each; bit for bit the same on every rank where the devices are.

    Raises:
        ValueError: an argument that does not fit, or differs between ranks where it may not; every rank raises, none
            is left waiting. On the CPU also a target outside the vocabulary, which gives NaN on other devices.
        TypeError: process_group is none, or the head is no plain dense tensor; every rank raises in the latter case.
    """
    grad = torch.is_grad_enabled()
    needs = Needs(*(grad and x is not None and x.requires_grad for x in (hidden, weight, bias)))
    shard, chosen = agreed_shard(
        process_group, hidden, weight, targets, bias, {_OPTIONS: options}, needs, backend, max_logits_bytes
    )
    check_target_values(targets, shard.vocab, options.ignore_index)
    check_derivatives(hidden, weight, bias)
    with torch.autocast(hidden.device.type, enabled=False):
        logps, *values = _VocabParallelLogprobs.apply(hidden, weight, bias, targets, shard, options, chosen, needs)
    return logps, dict(zip(options.stats, values, strict=True))


class _VocabParallelLogprobs(ReverseModeFunction):
    """(hidden, weight, bias, targets) -> logps and the statistics named in options; a gradient of logps only."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        shard: VocabShard,
        options: LogitOptions,
        backend: str,
        needs: Needs,
    ) -> tuple[Tensor, ...]:
        """Log-probs (N,), then one (N,) tensor a statistic."""
        inputs = HeadInputs(hidden, weight, bias, targets, options)
        rows, kept, products = passes.forward(ShardedEngine(inputs, shard, backend, keep=needs.trains), needs)
        ctx.mark_non_differentiable(*rows.stats.values())
        ctx.shard, ctx.options, ctx.backend, ctx.needs = shard, options, backend, needs
        if any(needs):
            ctx.save_for_backward(hidden, weight, bias, targets, products, *kept, *rows.sums)
        return (rows.logps, *rows.stats.values())

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad_logps: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """dh (the sum over ranks), dW and db (this rank's rows) for the gradient of logps (N,)."""
        hidden, weight, bias, targets, products, exp, tile_max, *sums = ctx.saved_tensors
        needs: Needs = ctx.needs
        inputs = HeadInputs(hidden, weight, bias, targets, ctx.options)
        with torch.autocast(hidden.device.type, enabled=False):
            engine = ShardedEngine(inputs, ctx.shard, ctx.backend, keep=needs.trains)
            row_sums = RowSums(*sums)
            c = row_coefficients(grad_logps, row_sums.rescale, engine.ignored)
            if needs.trains:
                gradients = passes.backward(engine, needs, c, row_sums, KeptRows(exp, tile_max))
            else:
                gradients = engine.all_reduced(products * c.unsqueeze(1)), None, None
        return (*gradients, *(None,) * 5)


def from_dtensor(weight: DTensor, *, name: str = "weight") -> tuple[Tensor, dist.ProcessGroup | None]:
    """A DTensor head as what vocab_parallel_logprobs takes: this rank's rows and the group that shares the others.

    Args:
        weight: (V, D) or, for a bias, (V,), on a one-dimensional mesh: Shard(0), or Replicate.
        name: the argument that messages speak of.

    Returns:
        The local tensor, whose gradient flows back to the DTensor, and its group; None for a replicated head, which
        every rank can use as an ordinary one.

    Raises:
        ValueError: another placement or mesh, or a mesh that does not list its ranks in the order of its group.
    """
    from torch.distributed.tensor import Replicate, Shard

    mesh = weight.device_mesh
    placement = weight.placements[0]
    # By type: a strided shard's rows are not consecutive, and it is a Shard too.
    if mesh.ndim != 1 or not (type(placement) is Replicate or (type(placement) is Shard and placement.dim == 0)):
        raise ValueError(
            f"{name}: expected a DTensor with Shard(0) or Replicate on a one-dimensional mesh, got "
            f"{weight.placements} on a mesh of {tuple(mesh.shape)}: redistribute it, or gather it with full_tensor()"
        )
    if isinstance(placement, Replicate):
        return weight.to_local(), None
    group = mesh.get_group()
    if mesh.mesh.tolist() != dist.get_process_group_ranks(group):
        raise ValueError(
            f"{name}: expected a mesh in the order of its process group, {dist.get_process_group_ranks(group)}, "
            f"got {mesh.mesh.tolist()}: build the mesh from ascending ranks"
        )
    return weight.to_local(), group


def local_shards(
    weight: Tensor, bias: Tensor | None, process_group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor | None, dist.ProcessGroup | None]:
    """Weight and bias as plain tensors, and the group that shares the vocabulary: the DTensor's own, if it is one.

    Raises:
        ValueError: a DTensor that cannot be used (from_dtensor), or process_group beside a DTensor of another group.
    """
    if hasattr(bias, "device_mesh"):
        bias, _ = from_dtensor(bias, name="bias")  # type: ignore[arg-type]
    if not hasattr(weight, "device_mesh"):
        return weight, bias, process_group
    weight, own = from_dtensor(weight)  # type: ignore[arg-type]
    if process_group is not None and process_group is not own:
        raise ValueError("process_group: expected None beside a DTensor weight, which brings its own")
    return weight, bias, own


def _checked_backend(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, backend: str) -> str:
    check_head(hidden, weight, bias, targets, may_be_empty=True)
    chosen = "fused" if backend == "fused" else choose_backend(backend, hidden.device)
    if chosen in ("reference", "fused") or (chosen == "triton" and hidden.dtype == torch.float64):
        raise ValueError(
            "backend: expected 'torch' with process_group, or 'triton' for other dtypes than float64, "
            f"got {backend!r} for {hidden.dtype}: use 'torch'"
        )
    return chosen


def agreed_shard(
    process_group: dist.ProcessGroup,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    same: dict[str, Any],
    needs: Needs,
    backend: str,
    max_logits_bytes: int | None,
    *,
    check: Callable[[], None] = lambda: None,
) -> tuple[VocabShard, str]:
    """This rank's part of the head, and the backend: checked on every rank, so that all go on or all raise.

    A collective. Arguments as in vocab_parallel_logprobs, and:

    Args:
        same: further arguments that must be the same on every rank, by what messages call them.
        needs: which gradients the call needs, the same on every rank.
        check: raises ValueError or TypeError for this rank's further arguments.

    Raises:
        ValueError, TypeError: as in vocab_parallel_logprobs.
    """
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(f"process_group: expected a torch.distributed.ProcessGroup, got {type(process_group).__name__}")
    problem, chosen = None, ""
    try:
        chosen = _checked_backend(hidden, weight, targets, bias, backend)
        check()
    except (TypeError, ValueError) as error:
        problem = error
    budget = default_logits_bytes(hidden.device) if max_logits_bytes is None else max_logits_bytes
    same = {
        "hidden (N, D)": tuple(hidden.shape),
        "the dtype of hidden": hidden.dtype,
        "which of hidden, weight and bias require a gradient": tuple(needs),
        "bias, given or None": bias is None,
        **same,
    }
    return _agree(process_group, hidden, weight, targets, same, budget, problem), chosen


def _agree(
    group: dist.ProcessGroup,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    same: dict[str, Any],
    max_logits_bytes: int,
    problem: Exception | None,
) -> VocabShard:
    """The one exchange of integers: every rank learns the shard sizes, and whether all may go on, or none."""
    digests = [zlib.crc32(repr(value).encode()) for value in same.values()]
    rows, device = 0 if problem else weight.shape[0], head_device(hidden.device)
    numbers = torch.tensor(
        [problem is not None, rows, max_logits_bytes, device.multiprocessors, *digests, 0],
        dtype=torch.int64,
        device=hidden.device,
    )
    if problem is None:
        numbers[-1] = _fingerprint(targets)
    gathered = numbers.new_empty(group.size(), len(numbers))
    dist.all_gather(list(gathered.unbind()), numbers, group)
    refused, sizes, budgets, multiprocessors, *settings = gathered.t().tolist()
    if problem is not None:
        raise problem
    if any(refused):
        ranks = [rank for rank, flag in enumerate(refused) if flag]
        raise ValueError(f"process_group: ranks {ranks} refused their arguments (their messages say why), so all do")
    for name, values in zip((*same, "targets"), settings, strict=True):
        ranks = [rank for rank, value in enumerate(values) if value != values[0]]
        if ranks:
            here = f" (here: {same[name]})" if name in same else ""
            raise ValueError(
                f"{name}: expected the same on every rank of process_group, got another value on ranks {ranks} than on "
                f"rank 0{here}: its ranks share one batch; gather a head that is sharded for data parallelism (FSDP)"
            )
    if sum(sizes) == 0:
        raise ValueError("weight: expected at least one row over all ranks of process_group, got none")
    device = replace(device, multiprocessors=min(multiprocessors))
    return VocabShard(group, group.rank(), tuple(sizes), min(budgets), device)


def _fingerprint(targets: Tensor) -> Tensor:
    """An int64 scalar that differs where targets (N,), or their order, differ; computed without a sync."""
    mixed = targets * 0x9E3779B1 + torch.arange(len(targets), device=targets.device) * 0x85EBCA6B
    return ((mixed ^ (mixed >> 15)) * 0x27D4EB2F165667C5).sum()
