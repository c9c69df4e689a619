"""The whole preference loss from hidden states and the head, pairs known: the cheapest path for a trained head (API c).

The pairs say which sequences a loss couples. E of a few whole components of the pair graph is kept in a ring; their
coefficients follow at once, and the ring is flushed into dh, dW and db before the next components come. So no row is
computed twice: 3 GEMMs in units of 2·N·D·V for a trained head, 2 for a frozen one, 1 without gradients. A component
that is longer than the ring keeps what fits and recomputes the rest.

Everything happens in forward; backward multiplies by the upstream scalar and hands the gradients over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpofast.first_order import first_order_only, no_second_derivative
from dpofast.gemm import accumulate_dtype
from dpofast.head import (
    Gradients,
    Head,
    HeadPlan,
    autocast_inputs,
    check_head,
    chunks,
    default_logits_bytes,
)
from dpofast.preference import PairTerms, PreferenceLoss, PreferenceOutput, check_pairs, pair_terms, spread
from dpofast.reference import IGNORE_INDEX
from dpofast.rows import LogitOptions, RowResult, check_target_values, choose_backend

_Needs = tuple[bool, bool, bool]
_Seven = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
_Gradient = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Step:
    """What a call is about, beside its float tensors: validated by linear_preference_loss."""

    targets: Tensor
    cu_targets: Tensor
    pairs: Tensor
    ref_logps: Tensor
    loss: PreferenceLoss
    num_pairs: int
    options: LogitOptions
    backend: str
    max_logits_bytes: int


def components(cu_targets: list[int], pairs: list[list[int]]) -> list[tuple[int, int]]:
    """The shortest runs of consecutive sequences [start, stop) that no pair leaves."""
    reach = list(range(len(cu_targets) - 1))
    for pair in pairs:
        low, high = min(pair), max(pair)
        reach[low] = max(reach[low], high)
    runs, start, stop = [], 0, 0
    for sequence, furthest in enumerate(reach):
        stop = max(stop, furthest + 1)
        if sequence + 1 == stop:
            runs.append((start, stop))
            start = stop
    return runs


def flushes(cu_targets: list[int], runs: list[tuple[int, int]], rows: int) -> list[tuple[int, int]]:
    """Neighbouring runs joined while together they have at most `rows` targets."""
    joined: list[tuple[int, int]] = []
    for start, stop in runs:
        if joined and cu_targets[stop] - cu_targets[joined[-1][0]] <= rows:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def compute(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, step: Step, needs: _Needs
) -> tuple[PairTerms, _Gradient]:
    """The pairs' terms, and the gradients of sum(losses)/num_pairs that are needed."""
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        if needs[1] or needs[2]:
            return _with_trained_head(hidden, weight, bias, step, needs)
        return _with_frozen_head(hidden, weight, bias, step, needs[0])


def _with_frozen_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, step: Step, need_dh: bool
) -> tuple[PairTerms, _Gradient]:
    """E·W is written where dh will be, and scaled by row once all coefficients are known."""
    plan = HeadPlan.make(len(step.targets), weight.shape[0], hidden.dtype, step.max_logits_bytes, keep=False)
    head = Head(hidden, weight, bias, step.targets, step.options, step.backend, plan)
    dh = torch.empty_like(hidden) if need_dh else None
    results = []
    for rows in chunks(0, len(step.targets), plan.scratch_rows):
        if dh is None:
            results.append(head.logps(rows))
        else:
            exp, result = head.exp(rows)
            dh[rows] = head.hidden_product(exp)
            results.append(result)
    terms, coefficients = _terms(head, results, step, step.cu_targets, step.pairs, step.ref_logps)
    if dh is not None:
        dh.mul_(coefficients.unsqueeze(1))
    return terms, (dh, None, None)


def _with_trained_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, step: Step, needs: _Needs
) -> tuple[PairTerms, _Gradient]:
    cu_targets = step.cu_targets.tolist()
    runs = components(cu_targets, step.pairs.tolist())
    largest = max((cu_targets[stop] - cu_targets[start] for start, stop in runs), default=0)
    rows = len(step.targets)
    plan = HeadPlan.make(rows, weight.shape[0], hidden.dtype, step.max_logits_bytes, keep=True, largest=largest)
    head = Head(hidden, weight, bias, step.targets, step.options, step.backend, plan)
    ring = head.kept()
    plan_of_flushes = flushes(cu_targets, runs, plan.kept_rows)
    once = len(plan_of_flushes) == 1 and rows <= plan.kept_rows
    gradients = Gradients(head, needs, flushes=1 if once else 2)
    parts = []
    for start, stop in plan_of_flushes:
        first, last = cu_targets[start], cu_targets[stop]
        kept = slice(first, min(last, first + plan.kept_rows))
        beyond = chunks(kept.stop, last, plan.scratch_rows)
        exp = ring[: kept.stop - kept.start]
        results = [*head.exp_into(exp, kept), *(head.logps(rows) for rows in beyond)]
        inside = (step.pairs[:, 0] >= start) & (step.pairs[:, 0] < stop)
        local = step.cu_targets[start : stop + 1] - first
        terms, coefficients = _terms(head, results, step, local, step.pairs[inside] - start, step.ref_logps[start:stop])
        gradients.flush(kept, exp, coefficients[: kept.stop - first])
        for rows_beyond in beyond:
            share = coefficients[rows_beyond.start - first : rows_beyond.stop - first]
            gradients.flush(rows_beyond, head.exp(rows_beyond)[0], share)
        parts.append((inside, terms))
    return _joined(parts, step, head), gradients.finish()


def _terms(
    head: Head, results: list[RowResult], step: Step, cu_targets: Tensor, pairs: Tensor, ref_logps: Tensor
) -> tuple[PairTerms, Tensor]:
    """The terms of some sequences, and the row coefficients c (rows,) of their targets."""
    logps, scale = head.joined(results, "logps"), head.joined(results, "scale")
    terms = pair_terms(logps, cu_targets, pairs, ref_logps, step.loss, step.backend)
    by_token = spread(terms.coefficients / step.num_pairs, cu_targets, len(logps))
    # where, not times zero: an ignored row counts as 0 even where the loss is not finite
    return terms, torch.where(scale == 0, 0.0, by_token * scale)


def _joined(parts: list[tuple[Tensor, PairTerms]], step: Step, head: Head) -> PairTerms:
    """The flushes' terms in the order of the sequences and pairs."""
    losses = head.hidden.new_empty(len(step.pairs), dtype=head.wide)
    for inside, terms in parts:
        losses[inside.nonzero().squeeze(1).to(losses.device, non_blocking=True)] = terms.losses
    fields = ("logps", "rewards", "coefficients")
    return PairTerms(losses, *(torch.cat([getattr(terms, field) for _, terms in parts]) for field in fields))


class LinearPreference(torch.autograd.Function):
    """(hidden, weight, bias) -> loss, losses, logps, rewards; the first is differentiable."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, step: Step, needs: _Needs
    ) -> tuple[Tensor, ...]:
        """Compute loss and gradients."""
        check_target_values(step.targets, weight.shape[0], step.options.ignore_index)
        terms, gradients = compute(hidden, weight, bias, step, needs)
        outputs = (terms.losses, terms.logps, terms.rewards)
        ctx.mark_non_differentiable(*outputs)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.step, ctx.needs, ctx.gradients = step, needs, gradients
        return (terms.losses.sum() / step.num_pairs, *outputs)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:  # type: ignore[override]
        """Scale the gradients in place and give them away, without a (V, D) copy; a second backward computes anew."""
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            hidden, weight, bias = ctx.saved_tensors
            gradients = compute(hidden, weight, bias, ctx.step, ctx.needs)[1]
        if not (grad_loss.is_cpu and grad_loss.item() == 1.0):
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(grad_loss)
        return (*gradients, None, None)


@torch.library.custom_op("dpofast::linear_preference", mutates_args=())
def linear_preference_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    cu_targets: Tensor,
    pairs: Tensor,
    ref_logps: Tensor,
    kind: str,
    beta: float,
    label_smoothing: float,
    num_pairs: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    backend: str,
    max_logits_bytes: int,
    need_dh: bool,
    need_dw: bool,
    need_db: bool,
) -> _Seven:
    """The same as one operator, for torch.compile: loss, losses, logps, rewards, dh, dW, db (empty if not needed)."""
    check_target_values(targets, weight.shape[0], ignore_index)
    loss = PreferenceLoss(kind=kind, beta=beta, label_smoothing=label_smoothing)
    options = LogitOptions(temperature, logit_scale, softcap, ignore_index)
    step = Step(targets, cu_targets, pairs, ref_logps, loss, num_pairs, options, backend, max_logits_bytes)
    terms, gradients = compute(hidden, weight, bias, step, (need_dh, need_dw, need_db))
    dh, dw, db = (hidden.new_empty(0) if gradient is None else gradient for gradient in gradients)
    return terms.losses.sum() / num_pairs, terms.losses, terms.logps, terms.rewards, dh, dw, db


@linear_preference_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    cu_targets: Tensor,
    pairs: Tensor,
    *arguments: Any,
) -> _Seven:
    need_dh, need_dw, need_db = arguments[-3:]

    def wide(*shape: int) -> Tensor:
        return hidden.new_empty(shape, dtype=accumulate_dtype(hidden.dtype))

    sequences = cu_targets.shape[0] - 1
    return (
        wide(),
        wide(pairs.shape[0]),
        wide(sequences),
        wide(sequences),
        torch.empty_like(hidden) if need_dh else hidden.new_empty(0),
        torch.empty_like(weight) if need_dw else hidden.new_empty(0),
        weight.new_empty(weight.shape[0]) if need_db else hidden.new_empty(0),
    )


@torch.library.custom_op("dpofast::scale_gradient", mutates_args=())
def scale_gradient_op(gradient: Tensor, scale: Tensor) -> Tensor:
    """gradient · scale, an operator of its own so that differentiating it again raises."""
    return gradient * scale.to(gradient.dtype)


@scale_gradient_op.register_fake
def _(gradient: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(gradient)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[4:])
    ctx.needs = inputs[-3:]


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    scaled = [
        scale_gradient_op(gradient, grad_loss) if need else None
        for gradient, need in zip(ctx.saved_tensors, ctx.needs, strict=True)
    ]
    return (*scaled, *(None,) * 17)


linear_preference_op.register_autograd(_backward, setup_context=_setup_context)
scale_gradient_op.register_autograd(no_second_derivative)


def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_targets: Tensor,
    pairs: Tensor,
    ref_logps: Tensor,
    *,
    loss: PreferenceLoss | None = None,
    num_pairs: int | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    max_logits_bytes: int | None = None,
    backend: str = "auto",
) -> PreferenceOutput:
    """The preference loss of P pairs straight from hidden states: no row of the head is computed twice.

    Args:
        hidden: (N, D), float32, bfloat16, float16 or float64.
        weight: (V, D), the head, in hidden's dtype. Under autocast both are cast here, once.
        targets: (N,), int64.
        cu_targets: (S+1,) int32 on the CPU: sequence s owns targets[cu_targets[s]:cu_targets[s+1]].
        pairs: (P, 2) int32 on the CPU, chosen and rejected sequence.
        ref_logps: (S,) float32, the reference's summed log-probs, nats.
        loss: kind and options, default PreferenceLoss().
        num_pairs: what the sum over pairs is divided by, default P.
        bias, temperature, logit_scale, softcap, ignore_index, max_logits_bytes, backend: as in linear_logprobs, without
            the "reference" backend.

    Returns:
        PreferenceOutput: loss scalar, differentiable; losses (P,), logps and rewards (S,), detached.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit, a pair that names a missing sequence.
        TypeError: a head weight that is no plain dense tensor.
    """
    loss = PreferenceLoss() if loss is None else loss
    options = LogitOptions(temperature, logit_scale, softcap, ignore_index)
    hidden, weight, bias = autocast_inputs(hidden, weight, bias)
    check_head(hidden, weight, bias, targets)
    _check_pairs(targets, cu_targets, pairs, ref_logps)
    chosen = choose_backend(backend, hidden.device)
    if chosen == "reference":
        raise ValueError("backend: expected auto, triton or torch; the reference is preference_loss of linear_logprobs")
    divisor = len(pairs) if num_pairs is None else num_pairs
    budget = default_logits_bytes(hidden.device) if max_logits_bytes is None else max_logits_bytes
    grad = torch.is_grad_enabled()
    needs = tuple(grad and x is not None and x.requires_grad for x in (hidden, weight, bias))
    if torch.compiler.is_compiling():
        values = linear_preference_op(
            hidden,
            weight,
            bias,
            targets,
            cu_targets,
            pairs,
            ref_logps,
            loss.kind,
            loss.beta,
            loss.label_smoothing,
            divisor,
            temperature,
            logit_scale,
            softcap,
            ignore_index,
            chosen,
            budget,
            *needs,
        )[:4]
    else:
        step = Step(targets, cu_targets, pairs, ref_logps, loss, divisor, options, chosen, budget)
        values = LinearPreference.apply(hidden, weight, bias, step, needs)
    return PreferenceOutput(*values)


def _check_pairs(targets: Tensor, cu_targets: Tensor, pairs: Tensor, ref_logps: Tensor) -> None:
    """What a call with known pairs needs; values are looked at where they lie on the CPU, outside a compiled graph."""
    for name, tensor in (("cu_targets", cu_targets), ("pairs", pairs)):
        if tensor.dtype != torch.int32 or not tensor.is_cpu:
            raise ValueError(f"{name}: expected int32 on the CPU, got {tensor.dtype} on {tensor.device}")
    if cu_targets.dim() != 1 or len(cu_targets) == 0:
        raise ValueError(f"cu_targets: expected shape (S+1,), got {tuple(cu_targets.shape)}")
    check_pairs(ref_logps, pairs, ref_logps)
    if ref_logps.shape != (len(cu_targets) - 1,) or ref_logps.device != targets.device:
        raise ValueError(
            f"ref_logps: expected shape ({len(cu_targets) - 1},) on {targets.device}, one value a sequence of "
            f"cu_targets, got {tuple(ref_logps.shape)} on {ref_logps.device}"
        )
    if torch.compiler.is_compiling():
        return
    bounds = cu_targets.tolist()
    if bounds[0] != 0 or bounds[-1] != len(targets) or any(b < a for a, b in zip(bounds[:-1], bounds[1:], strict=True)):
        raise ValueError(f"cu_targets: expected to rise from 0 to the {len(targets)} targets, got {bounds}")
