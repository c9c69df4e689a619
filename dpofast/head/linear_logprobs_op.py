"""torch.library operators of linear_logprobs, forward and backward, so that torch.compile sees a graph without breaks.

GEMMs and what forward keeps for backward: engine/passes.py. Operators return tensors alone: one that is not needed is
empty.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpofast.common.autograd import check_derivatives, no_second_derivative
from dpofast.common.backend import uses_triton
from dpofast.head.engine import passes
from dpofast.head.engine.interface import (
    HeadEngine,
    HeadInputs,
    KeptRows,
    Needs,
    RowSums,
    row_coefficients,
    stat_dtype,
)
from dpofast.head.engine.make import make_engine
from dpofast.head.engine.rows import scale_rows
from dpofast.head.operators import custom_operator, gradients_of
from dpofast.head.options import STATS, LogitOptions
from dpofast.head.validate import check_target_values


class LinearArguments(NamedTuple):
    """The forward operator's arguments. stats: the names of the statistics, with commas between them."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    temperature: float
    logit_scale: float
    softcap: float | None
    ignore_index: int
    stats: str
    backend: str
    max_logits_bytes: int | None
    need_dh: bool
    need_dw: bool
    need_db: bool

    @property
    def needs(self) -> Needs:
        """Which gradients are needed: an operator does not know what its caller's tensors require."""
        return Needs(self.need_dh, self.need_dw, self.need_db)

    def engine(self, *, with_stats: bool = True) -> HeadEngine:
        """The call's engine: forward's and backward's have the same plan."""
        stats = tuple(filter(None, self.stats.split(",")))
        options = LogitOptions(self.temperature, self.logit_scale, self.softcap, self.ignore_index, stats)
        inputs = HeadInputs(self.hidden, self.weight, self.bias, self.targets, options)
        return make_engine(inputs, self.backend, self.max_logits_bytes, needs=self.needs, with_stats=with_stats)


class LinearResults(NamedTuple):
    """The forward operator's results: logps (N,), what backward needs, and the four statistics (N,)."""

    logps: Tensor
    rescale: Tensor
    target_exp: Tensor
    row_max: Tensor
    sum_exp: Tensor
    kept_exp: Tensor
    kept_tile_max: Tensor
    products: Tensor
    entropy: Tensor
    mean_logits: Tensor
    is_top1: Tensor
    log_sum_sq_probs: Tensor

    @staticmethod
    def pack(logps: Tensor, sums: RowSums, kept: KeptRows, products: Tensor, stats: dict[str, Tensor]) -> LinearResults:
        """All results, the statistics that were not asked for empty."""
        absent = {name: logps.new_empty(0, dtype=stat_dtype(name, logps.dtype)) for name in STATS if name not in stats}
        return LinearResults(logps, *sums, *kept, products, *({**absent, **stats}[name] for name in STATS))

    @property
    def for_backward(self) -> tuple[Tensor, ...]:
        """The fields of the backward operator's Upstream but the first, RowSums and KeptRows."""
        sums = RowSums(self.rescale, self.target_exp, self.row_max, self.sum_exp)
        return (self.products, *sums, *KeptRows(self.kept_exp, self.kept_tile_max))


class Upstream(NamedTuple):
    """The gradient (N,) that reaches logps, and E·W (N, D) of a head that does not train, else (0,)."""

    grad_logps: Tensor
    products: Tensor


def per_token(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: LogitOptions,
    backend: str,
    max_logits_bytes: int | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs (N,), differentiable, and the statistics that options name, (N,) each."""
    check_derivatives(hidden, weight, bias)
    grad = torch.is_grad_enabled()
    arguments = LinearArguments(
        hidden,
        weight,
        bias,
        targets,
        options.temperature,
        options.logit_scale,
        options.softcap,
        options.ignore_index,
        ",".join(options.stats),
        backend,
        max_logits_bytes,
        *(grad and x is not None and x.requires_grad for x in (hidden, weight, bias)),
    )
    results = LinearResults(*linear_logprobs_op(*arguments))
    return results.logps, {name: getattr(results, name) for name in options.stats}


def _forward(arguments: LinearArguments) -> LinearResults:
    check_target_values(arguments.targets, arguments.weight.shape[0], arguments.ignore_index)
    with torch.autocast(arguments.hidden.device.type, enabled=False):
        rows, kept, products = passes.forward(arguments.engine(), arguments.needs)
    return LinearResults.pack(rows.logps, rows.sums, kept, products, rows.stats)


def _fake_forward(arguments: LinearArguments) -> LinearResults:
    engine, count = arguments.engine(), arguments.targets.shape[0]
    hidden, wide, names = arguments.hidden, engine.inputs.wide, engine.inputs.options.stats
    stats = {name: hidden.new_empty(count, dtype=stat_dtype(name, wide)) for name in names}
    products = passes.empty_products(engine, arguments.needs)
    logps = hidden.new_empty(count, dtype=wide)
    return LinearResults.pack(logps, engine.empty_sums(count), engine.new_kept(), products, stats)


def _backward_run(
    upstream: Upstream, sums: RowSums, kept: KeptRows, arguments: LinearArguments
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = arguments.hidden
    coefficients = row_coefficients(upstream.grad_logps, sums.rescale, arguments.targets == arguments.ignore_index)
    if not arguments.needs.trains:
        dh = torch.empty_like(hidden)
        scale_rows(dh, upstream.products, coefficients, triton=uses_triton(arguments.backend))
        return dh, hidden.new_empty(0), hidden.new_empty(0)
    with torch.autocast(hidden.device.type, enabled=False):
        gradients = passes.backward(arguments.engine(with_stats=False), arguments.needs, coefficients, sums, kept)
    dh, dw, db = (hidden.new_empty(0) if gradient is None else gradient for gradient in gradients)
    return dh, dw, db


def _fake_backward(
    upstream: Upstream, sums: RowSums, kept: KeptRows, arguments: LinearArguments
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(arguments.hidden, arguments.weight, arguments.needs)


def fake_gradients(hidden: Tensor, weight: Tensor, needs: Needs) -> tuple[Tensor, Tensor, Tensor]:
    """dh (N, D), dW (V, D), db (V,) of fake tensors, (0,) where not needed."""
    return (
        torch.empty_like(hidden) if needs.hidden else hidden.new_empty(0),
        torch.empty_like(weight) if needs.weight else hidden.new_empty(0),
        weight.new_empty(weight.shape[0] if needs.bias else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, *settings = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for kept rows would be as large as they
    ctx.save_for_backward(hidden, weight, bias, targets, *LinearResults(*output).for_backward)
    ctx.settings = settings


def _backward(ctx: Any, grad_logps: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_logps is None:
        return gradients_of(LinearArguments)
    hidden, weight, bias, targets, *forward = ctx.saved_tensors
    arguments = LinearArguments(hidden, weight, bias, targets, *ctx.settings)
    gradients = linear_logprobs_backward_op(grad_logps, *forward, *arguments)
    dh, dw, db = (x if need else None for x, need in zip(gradients, arguments.needs, strict=True))
    return gradients_of(LinearArguments, hidden=dh, weight=dw, bias=db)


linear_logprobs_op = custom_operator(
    "dpofast::linear_logprobs", (LinearArguments,), len(LinearResults._fields), _forward, _fake_forward
)
linear_logprobs_backward_op = custom_operator(
    "dpofast::linear_logprobs_backward",
    (Upstream, RowSums, KeptRows, LinearArguments),
    3,
    _backward_run,
    _fake_backward,
)
linear_logprobs_op.register_autograd(_backward, setup_context=_setup_context)
linear_logprobs_backward_op.register_autograd(no_second_derivative)
