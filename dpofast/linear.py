"""Log-probs from hidden states and the head, with the fewest GEMMs that per-token gradients allow (API b).

| needed                 | forward keeps                       | GEMMs (units of 2·N·D·V) |
|------------------------|-------------------------------------|--------------------------|
| no gradient            | nothing                             | 1                        |
| gradient to hidden     | E·W per row, (N, D)                 | 2                        |
| the head trains        | E for the rows that fit, recomputes | 3 + recomputed/N         |
| the head trains alone  | the same, without E·W               | 2 + recomputed/N         |

Two torch.library operators, forward and backward, so that torch.compile sees a graph without breaks. A tensor that is
not needed is empty.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpofast.first_order import no_second_derivative
from dpofast.gemm import accumulate_dtype
from dpofast.head import Gradients, Head, HeadPlan, chunks, exp_dtype, exp_rows_like, scale_rows
from dpofast.rows import STATS, LogitOptions, check_target_values, row_temporaries

_Eight = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
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
    logps, _, _, _, *values = linear_logprobs_op(
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
) -> _Eight:
    """logps (N,), scale (N,), kept E (K, V), E·W (N, D), then the four statistics (N,)."""
    options = _options(temperature, logit_scale, softcap, ignore_index, stats)
    check_target_values(targets, weight.shape[0], ignore_index)
    trains = need_dw or need_db
    plan = _plan(targets, weight, options, backend, max_logits_bytes, trains)
    with torch.autocast(hidden.device.type, enabled=False):
        head = Head(hidden, weight, bias, targets, options, backend, plan)
        kept = head.kept()
        products = hidden.new_empty(
            (len(targets), weight.shape[1]) if need_dh and not trains else (0,), dtype=head.narrow
        )
        if not (need_dh or trains):
            results = head.all_logps()
        elif trains:  # the rows beyond those that are kept are recomputed in backward
            results = head.exp_into(kept, slice(0, plan.kept_rows))
            results += [head.logps(rows) for rows in chunks(plan.kept_rows, len(targets), plan.scratch_rows)]
        else:
            results = []
            for rows in chunks(0, len(targets), plan.scratch_rows):
                exp, result = head.exp(rows)
                head.hidden_product(products[rows], exp)
                results.append(result)
        logps, scale = head.joined(results, "logps"), head.joined(results, "scale")
        values = [_statistic(name, results, options, logps) for name in STATS]
    return (logps, scale, kept, products, *values)  # type: ignore[return-value]


def _plan(
    targets: Tensor, weight: Tensor, options: LogitOptions, backend: str, max_logits_bytes: int, keep: bool
) -> HeadPlan:
    temporaries = row_temporaries(options, backend)
    return HeadPlan.make(len(targets), weight, max_logits_bytes, keep=keep, temporaries=temporaries)


def _statistic(name: str, results: list[Any], options: LogitOptions, logps: Tensor) -> Tensor:
    dtype = torch.bool if name == "is_top1" else logps.dtype
    parts = [result.stats[name] for result in results] if name in options.stats else []
    return torch.cat(parts) if parts else logps.new_empty(0, dtype=dtype)


@linear_logprobs_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *arguments: Any) -> _Eight:
    options = _options(*arguments[:5])
    backend, max_logits_bytes, need_dh, need_dw, need_db = arguments[5:]
    n, width = targets.shape[0], weight.shape[1]
    trains = need_dw or need_db
    plan = _plan(targets, weight, options, backend, max_logits_bytes, trains)
    wide, narrow = accumulate_dtype(hidden.dtype), exp_dtype(hidden.dtype)
    products = (n, width) if need_dh and not trains else (0,)
    values = [
        hidden.new_empty(n if name in options.stats else 0, dtype=torch.bool if name == "is_top1" else wide)
        for name in STATS
    ]
    return (  # type: ignore[return-value]
        hidden.new_empty(n, dtype=wide),
        hidden.new_empty(n, dtype=wide),
        exp_rows_like(weight, plan.kept_rows, narrow),
        hidden.new_empty(products, dtype=narrow),
        *values,
    )


@torch.library.custom_op("dpofast::linear_logprobs_backward", mutates_args=())
def linear_logprobs_backward_op(
    grad_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scale: Tensor,
    kept: Tensor,
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
    coefficients = torch.where(scale == 0, 0.0, grad_logps * scale)
    nothing = hidden.new_empty(0)
    if not (need_dw or need_db):
        scaled = torch.empty_like(hidden)
        scale_rows(scaled, products, coefficients)
        return scaled, nothing, nothing.clone()
    options = _options(temperature, logit_scale, softcap, ignore_index, stats)
    plan = _plan(targets, weight, options, backend, max_logits_bytes, True)  # forward's
    options = _options(temperature, logit_scale, softcap, ignore_index)
    with torch.autocast(hidden.device.type, enabled=False):
        head = Head(hidden, weight, bias, targets, options, backend, plan)
        recomputed = chunks(plan.kept_rows, len(targets), plan.scratch_rows)
        flushes = len(recomputed) + (plan.kept_rows > 0)
        gradients = Gradients(head, (need_dh, need_dw, need_db), flushes=flushes)
        if plan.kept_rows:
            rows = slice(0, plan.kept_rows)
            gradients.flush(rows, kept, coefficients[rows])
        for rows in recomputed:
            gradients.flush(rows, head.exp(rows)[0], coefficients[rows])
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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Eight) -> None:
    hidden, weight, bias, targets, *arguments = inputs
    _, scale, kept, products, *values = output
    ctx.mark_non_differentiable(scale, kept, products, *values)
    ctx.set_materialize_grads(False)  # zeros for kept would be as large as kept
    ctx.save_for_backward(hidden, weight, bias, targets, scale, kept, products)
    ctx.arguments, ctx.needs = arguments, arguments[-3:]


def _backward(ctx: Any, grad_logps: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_logps is None:
        return (None,) * 14
    gradients = linear_logprobs_backward_op(grad_logps, *ctx.saved_tensors, *ctx.arguments)
    return (*(gradient if need else None for gradient, need in zip(gradients, ctx.needs, strict=True)), *(None,) * 11)


linear_logprobs_op.register_autograd(_backward, setup_context=_setup_context)
linear_logprobs_backward_op.register_autograd(no_second_derivative)
