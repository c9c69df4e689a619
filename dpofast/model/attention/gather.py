"""K/V rows copied for every run of rows that attends to them, as one operator with a deterministic gradient.

On CUDA kernels/gather_kv.py does either direction in one launch, K and V together. torch's index_select is two launches
and two more of zeros and of atomic additions for its gradient, whose 16-bit sums are rounded after each addition, in no
fixed order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpofast.common.autograd import check_derivatives, no_second_derivative
from dpofast.head.operators import custom_operator, gradients_of
from dpofast.model.attention.chunks import runs_of
from dpofast.packing.segments import Segments

# Devices whose rows the kernels copy and sum.
_KERNELS_ON = ("cuda",)


class KeyRows(NamedTuple):
    """Which packed row every key is, and its inverse; int32, each on one device.

    Attributes:
        rows: (K,) packed row of every key, ordered by run (packing/segments.py).
        offsets: (T + 1,); row t is read as the keys copies[offsets[t]:offsets[t + 1]].
        copies: (K,) keys ordered by their row, those of one row by run.
    """

    rows: Tensor
    offsets: Tensor
    copies: Tensor

    @classmethod
    def of(cls, segments: Segments, chunk: int | None = None) -> KeyRows:
        """The keys of the segments, on the CPU."""
        rows = runs_of(segments, chunk).key_rows().int()
        counts = rows.bincount(minlength=segments.num_rows)
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        return cls(rows, offsets, rows.argsort(stable=True).int())


class _Source(NamedTuple):
    key: Tensor
    value: Tensor


class _Upstream(NamedTuple):
    grad_key: Tensor
    grad_value: Tensor


def gather_rows(key: Tensor, value: Tensor, rows: KeyRows) -> tuple[Tensor, Tensor]:
    """key[rows], value[rows]: (K, H_kv, Dh) contiguous of (T, H_kv, Dh), differentiable once."""
    check_derivatives(key, value)
    return gather_op(key, value, *rows)


def _gather(source: _Source, rows: KeyRows) -> tuple[Tensor, Tensor]:
    if source.key.device.type in _KERNELS_ON:
        from dpofast.kernels.gather_kv import gather_kv

        return gather_kv(*source, rows.rows)
    key, value = (part.index_select(0, rows.rows) for part in source)
    return key, value


def _fake_gather(source: _Source, rows: KeyRows) -> tuple[Tensor, Tensor]:
    key, value = (part.new_empty(len(rows.rows), *part.shape[1:]) for part in source)
    return key, value


def _sum(upstream: _Upstream, rows: KeyRows) -> tuple[Tensor, Tensor]:
    if upstream.grad_key.device.type in _KERNELS_ON:
        from dpofast.kernels.gather_kv import sum_kv

        return sum_kv(*upstream, rows.offsets, rows.copies)
    key, value = (_summed(part, rows) for part in upstream)
    return key, value


def _summed(grad: Tensor, rows: KeyRows) -> Tensor:
    wide = torch.promote_types(grad.dtype, torch.float32)
    total = grad.new_zeros(len(rows.offsets) - 1, *grad.shape[1:], dtype=wide)
    return total.index_add_(0, rows.rows, grad.to(wide)).to(grad.dtype)


def _fake_sum(upstream: _Upstream, rows: KeyRows) -> tuple[Tensor, Tensor]:
    key, value = (part.new_empty(len(rows.offsets) - 1, *part.shape[1:]) for part in upstream)
    return key, value


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[2:])


def _backward(ctx: Any, grad_key: Tensor, grad_value: Tensor) -> tuple[Tensor | None, ...]:
    key, value = sum_op(grad_key, grad_value, *ctx.saved_tensors)
    return (*gradients_of(_Source, key=key, value=value), *gradients_of(KeyRows))


gather_op = custom_operator("dpofast::gather_kv", (_Source, KeyRows), 2, _gather, _fake_gather)
sum_op = custom_operator("dpofast::sum_kv", (_Upstream, KeyRows), 2, _sum, _fake_sum)
gather_op.register_autograd(_backward, setup_context=_setup_context)
sum_op.register_autograd(no_second_derivative)
