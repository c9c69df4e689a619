"""Exchanges between the ranks that share a packed row (PackedBatch.split): of heads for rows, and of log-probs.

Attention needs all T rows, but heads know nothing of each other (DeepSpeed-Ulysses, arXiv 2309.14509): in an all-to-all
every rank gives away the other ranks' heads of its R rows, and gets the other rows of its own heads. It attends as one
process would, with H/k of H heads, and a second all-to-all exchanges rows for heads again. That is two collectives a
layer in the forward, as queries, keys and values travel together, and two in the backward. Each moves as many numbers
as a rank has, R · (H + 2 H_kv) · Dh and R · H · Dh, of which 1/k stay.

Rank r has rows r, r + k, r + 2k …, so what arrives, (k, R, …), is in the order of the row once its first two dimensions
are exchanged. Rows beyond the last, of which every rank computes as many as it takes to have R, are left out there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from dpofast.packing.parallel.row_split import RowSplit


class _AllToAll(torch.autograd.Function):
    """parts (k, ...), one for each rank -> (k, ...), one from each; it is its own inverse and its own derivative."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: Any) -> Tensor:  # type: ignore[override]
        ctx.group = group
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _AllToAll.apply(gradient.contiguous(), ctx.group), None


class _AllGather(torch.autograd.Function):
    """values (...) -> (k, ...), those of each rank.

    Every rank computes the same loss of them, so a rank's gradient of its own values is the whole one: nothing is
    summed.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:  # type: ignore[override]
        ctx.rank = group.rank()
        everyone = values.new_empty(group.size(), *values.shape)
        dist.all_gather(list(everyone.unbind()), values.contiguous(), group=group)
        return everyone

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return gradient[ctx.rank], None


def own_heads(query: Tensor, key: Tensor, value: Tensor, split: RowSplit) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's heads over all rows, from all heads over this rank's rows. A collective.

    Of fewer key/value heads than ranks every rank gets the one that its query heads attend to: they are copied, and
    their gradients summed.

    Args:
        query: (1, H, R, Dh).
        key: (1, H_kv, R, Dh), of query's dtype.
        value: (1, H_kv, R, Dv), of query's dtype.
        split: of the T rows over k ranks.

    Returns:
        (1, H/k, T, Dh), (1, max(H_kv/k, 1), T, Dh) and (1, max(H_kv/k, 1), T, Dv).

    Raises:
        ValueError: heads that k ranks cannot divide.
    """
    size, queries, keys = split.group.size(), query.shape[1], key.shape[1]
    if queries % size or (keys % size and size % keys):
        raise ValueError(
            f"split_over: {queries} query and {keys} key/value heads cannot be divided among the {size} processes of "
            "the group: expected a size that divides the query heads, and divides the key/value heads or is a "
            "multiple of them: take a smaller group"
        )
    if keys < size:
        key, value = (tensor.repeat_interleave(size // keys, dim=1) for tensor in (key, value))
    tensors = (query, key, value)
    by_rank = [tensor[0].unflatten(0, (size, -1)).transpose(1, 2).flatten(2) for tensor in tensors]
    widths = [part.shape[2] for part in by_rank]
    received = _AllToAll.apply(torch.cat(by_rank, dim=2).contiguous(), split.group)
    # Three tensors and not views of one, of which attention may keep one and copy the others.
    query, key, value = (
        part.transpose(0, 1).flatten(0, 1)[: split.num_rows].unflatten(1, (-1, tensor.shape[3])).transpose(0, 1)[None]
        for part, tensor in zip(received.split(widths, dim=2), tensors, strict=True)
    )
    return query, key, value


def own_rows(attended: Tensor, split: RowSplit) -> Tensor:
    """All heads over this rank's rows (1, R, H, Dv), from its own heads over all rows (1, T, H/k, Dv). A collective."""
    size, per_rank = split.group.size(), len(split.rows)
    rows = pad(attended[0].flatten(1), (0, 0, 0, size * per_rank - split.num_rows))
    received = _AllToAll.apply(rows.unflatten(0, (per_rank, size)).transpose(0, 1).contiguous(), split.group)
    return received.transpose(0, 1).reshape(1, per_rank, -1, attended.shape[3])


def all_targets(values: Tensor, split: RowSplit) -> Tensor:
    """Values (F, N) of all targets, in the order of the batch, from this rank's (F, N_r). A collective.

    The gradient of the result must be the same on every rank.
    """
    everyone = _AllGather.apply(pad(values, (0, split.most - values.shape[1])), split.group)
    return everyone.transpose(0, 1).flatten(1).index_select(1, split.gathered)
