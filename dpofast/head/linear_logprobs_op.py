"""Log-probs from hidden states and the head, with the fewest GEMMs that per-token gradients allow (API b).

| needed                 | forward keeps                       | GEMMs (units of 2·N·D·V) |
|------------------------|-------------------------------------|--------------------------|
| no gradient            | nothing                             | 1                        |
| gradient to hidden     | E·W per row, (N, D)                 | 2                        |
| the head trains        | E for the rows that fit, recomputes | 3 + recomputed/N         |
| the head trains alone  | the same, without E·W               | 2 + recomputed/N         |

Two torch.library operators, forward and backward, so that torch.compile sees a graph without breaks. A tensor that is
not needed is empty. head_of chooses how E is made: whole rows by kernels/ (head.py), or tiles of the vocabulary in
torch (vocab_tiles.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpofast.common.autograd import no_second_derivative
from dpofast.common.backend import uses_triton
from dpofast.head.engine.row_engine import Head, HeadPlan, scale_rows
from dpofast.head.engine.rows import RowResult
from dpofast.head.engine.tiled_engine import TiledHead, TilePlan
from dpofast.head.options import STATS, LogitOptions
from dpofast.head.validate import check_target_values

_Nine = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
_Three = tuple[Tensor, Tensor, Tensor]


def per_token(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: LogitOptions,
    backend: str,
    max_logits_bytes: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs (N,), differentiable, and the statistics that options name, (N,) each."""
    grad = torch.is_grad_enabled()
    # An operator does not know what its caller's tensors require.
    needs = [grad and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    logps, _, _, _, _, *values = linear_logprobs_op(
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
        *needs,
    )
    return logps, {name: value for name, value in zip(STATS, values, strict=True) if name in options.stats}


def head_of(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: LogitOptions,
    backend: str,
    max_logits_bytes: int,
    *,
    keep: bool,
    largest: int | None = None,
) -> Head | TiledHead:
    """The call's head, planned inside max_logits_bytes; keep and largest as in the plans' make."""
    rows = len(targets)
    if uses_triton(backend):
        plan = HeadPlan.make(rows, weight, max_logits_bytes, keep=keep, largest=largest)
        return Head(hidden, weight, bias, targets, options, backend, plan)
    tiles = TilePlan.make(rows, weight, max_logits_bytes, options, keep=keep, largest=largest)
    return TiledHead(hidden, weight, bias, targets, options, tiles)


def joined(head: Head | TiledHead, results: list[RowResult]) -> RowResult:
    """The results of consecutive rows as one."""
    hidden, names = head.hidden, head.options.stats
    if not results:
        sums = hidden.new_empty(head.SUMS, 0, dtype=head.wide)
        stats = {name: hidden.new_empty(0, dtype=_dtype_of(name, head.wide)) for name in names}
        return RowResult(torch.empty_like(sums[0]), sums, stats)
    return RowResult(
        torch.cat([result.logps for result in results]),
        torch.cat([result.sums for result in results], dim=1),
        {name: torch.cat([result.stats[name] for result in results]) for name in names},
    )


def _dtype_of(statistic: str, wide: torch.dtype) -> torch.dtype:
    return torch.bool if statistic == "is_top1" else wide


def _options(
    temperature: float, logit_scale: float, softcap: float | None, ignore_index: int, stats: str = ""
) -> LogitOptions:
    return LogitOptions(temperature, logit_scale, softcap, ignore_index, tuple(filter(None, stats.split(","))))


@torch.library.custom_op("dpofast::linear_logprobs", mutates_args=())
def linear_logprobs_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    stats: str,
    backend: str,
    max_logits_bytes: int,
    need_dh: bool,
    need_dw: bool,
    need_db: bool,
) -> _Nine:
    """logps (N,), RowResult's sums, the two of Kept, E·W (N, D), then the four statistics (N,)."""
    options = _options(temperature, logit_scale, softcap, ignore_index, stats)
    check_target_values(targets, weight.shape[0], ignore_index)
    trains = need_dw or need_db
    with torch.autocast(hidden.device.type, enabled=False):
        head = head_of(hidden, weight, bias, targets, options, backend, max_logits_bytes, keep=trains)
        kept = head.kept()
        products = hidden.new_empty(
            (len(targets), weight.shape[1]) if need_dh and not trains else (0,), dtype=head.narrow
        )
        if not (need_dh or trains):
            results = head.all_logps()
        elif trains:  # the rows beyond those that are kept are recomputed in backward
            results = head.keep(kept, slice(0, head.plan.kept_rows))
            results += [head.logps(rows) for rows in head.beyond(head.plan.kept_rows, len(targets))]
        else:
            results = head.frozen(products)
        rows = joined(head, results)
    nothing = [rows.logps.new_empty(0, dtype=_dtype_of(name, head.wide)) for name in STATS]
    values = [rows.stats.get(name, empty) for name, empty in zip(STATS, nothing, strict=True)]
    return (rows.logps, rows.sums, *kept, products, *values)  # type: ignore[return-value]


@linear_logprobs_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *arguments: Any) -> _Nine:
    options = _options(*arguments[:5])
    backend, max_logits_bytes, need_dh, need_dw, need_db = arguments[5:]
    n, width = targets.shape[0], weight.shape[1]
    trains = need_dw or need_db
    head = head_of(hidden, weight, bias, targets, options, backend, max_logits_bytes, keep=trains)
    products = (n, width) if need_dh and not trains else (0,)
    values = [hidden.new_empty(n if name in options.stats else 0, dtype=_dtype_of(name, head.wide)) for name in STATS]
    return (  # type: ignore[return-value]
        hidden.new_empty(n, dtype=head.wide),
        hidden.new_empty(head.SUMS, n, dtype=head.wide),
        *head.kept(),
        hidden.new_empty(products, dtype=head.narrow),
        *values,
    )


@torch.library.custom_op("dpofast::linear_logprobs_backward", mutates_args=())
def linear_logprobs_backward_op(
    grad_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    sums: Tensor,
    kept: Tensor,
    maxima: Tensor,
    products: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    stats: str,
    backend: str,
    max_logits_bytes: int,
    need_dh: bool,
    need_dw: bool,
    need_db: bool,
) -> _Three:
    """dh (N, D), dW (V, D), db (V,)."""
    # where, not times zero: an ignored row counts as 0 even if the gradient that reaches it is not finite
    coefficients = torch.where(sums[0] == 0, 0.0, grad_logps * sums[0])
    nothing = hidden.new_empty(0)
    if not (need_dw or need_db):
        scaled = torch.empty_like(hidden)
        scale_rows(scaled, products, coefficients)
        return scaled, nothing, nothing.clone()
    options = _options(temperature, logit_scale, softcap, ignore_index, stats)  # forward's, and so its plan
    with torch.autocast(hidden.device.type, enabled=False):
        head = head_of(hidden, weight, bias, targets, options, backend, max_logits_bytes, keep=True)
        head.options = _options(temperature, logit_scale, softcap, ignore_index)
        gradients = head.gradients((need_dh, need_dw, need_db))
        kept_rows = slice(0, head.plan.kept_rows)
        parts = [(kept_rows, (kept, maxima))] if head.plan.kept_rows else []
        for rows, known in [*parts, *((rows, None) for rows in head.beyond(kept_rows.stop, len(targets)))]:
            gradients.add(rows, coefficients[rows], sums[:, rows], known)
    dh, dw, db = gradients.finish()
    return tuple(nothing.clone() if x is None else x for x in (dh, dw, db))  # type: ignore[return-value]


@linear_logprobs_backward_op.register_fake
def _(grad_logps: Tensor, hidden: Tensor, weight: Tensor, *arguments: Any) -> _Three:
    need_dh, need_dw, need_db = arguments[-3:]
    return (
        torch.empty_like(hidden) if need_dh else hidden.new_empty(0),
        torch.empty_like(weight) if need_dw else hidden.new_empty(0),
        weight.new_empty(weight.shape[0] if need_db else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Nine) -> None:
    hidden, weight, bias, targets, *arguments = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for kept rows would be as large as they
    ctx.save_for_backward(hidden, weight, bias, targets, *output[1:5])
    ctx.arguments, ctx.needs = arguments, arguments[-3:]


def _backward(ctx: Any, grad_logps: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_logps is None:
        return (None,) * 14
    gradients = linear_logprobs_backward_op(grad_logps, *ctx.saved_tensors, *ctx.arguments)
    return (*(gradient if need else None for gradient, need in zip(gradients, ctx.needs, strict=True)), *(None,) * 11)


linear_logprobs_op.register_autograd(_backward, setup_context=_setup_context)
linear_logprobs_backward_op.register_autograd(no_second_derivative)
