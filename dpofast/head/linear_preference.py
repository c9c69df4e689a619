"""The whole preference loss from hidden states and the head, pairs known: the cheapest path for a trained head (API c).

The pairs say which sequences a loss couples. E of a few whole components of the pair graph is kept in a ring; their
coefficients follow at once, and the ring is flushed into dh, dW and db before the next components come. So no row is
computed twice: 3 GEMMs in units of 2·N·D·V for a trained head, 2 for a frozen one, 1 without gradients. A component
that is longer than the ring keeps what fits and recomputes the rest.

Everything happens in forward; backward multiplies by the upstream scalar and hands the gradients over. A coupled loss
(losses.py) makes one component of the whole call.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dpofast.common.autograd import first_order_only, no_second_derivative
from dpofast.common.backend import choose_backend
from dpofast.common.constants import IGNORE_INDEX
from dpofast.head.engine.matmul import accumulate_dtype
from dpofast.head.engine.row_engine import DEFAULT_LOGITS_BYTES, Head, scale_rows
from dpofast.head.engine.rows import RowResult
from dpofast.head.engine.tiled_engine import TiledHead
from dpofast.head.linear_logprobs_op import head_of, joined
from dpofast.head.options import LogitOptions
from dpofast.head.validate import autocast_inputs, check_head, check_target_values, check_tensors
from dpofast.losses.coefficients import PairTerms, pair_terms
from dpofast.losses.config import PreferenceLoss, checked_loss
from dpofast.losses.functional import PreferenceOutput
from dpofast.losses.pairs import StepTotals
from dpofast.losses.sequences import Tokens, side_indices
from dpofast.losses.validate import check_pair_names, check_reference

_Needs = tuple[bool, bool, bool]
_Seven = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
_Gradient = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Step:
    """What a call is about, beside its float tensors: validated by linear_preference_loss."""

    targets: Tensor
    cu_targets: Tensor
    pairs: Tensor
    ref_logps: Tensor | None
    loss: PreferenceLoss
    totals: StepTotals
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
    if "sft" in step.loss.kinds and step.totals.num_chosen_tokens is None:
        # of the call, not of one flush
        none = hidden.new_empty(0, dtype=accumulate_dtype(hidden.dtype))
        lengths = Tokens(none, step.cu_targets, _counted(step, slice(None))).lengths()
        chosen_tokens = lengths[side_indices(step.pairs, lengths.device)[:, 0]].sum()
        step = replace(step, totals=replace(step.totals, num_chosen_tokens=chosen_tokens))
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        if needs[1] or needs[2]:
            return _with_trained_head(hidden, weight, bias, step, needs)
        return _with_frozen_head(hidden, weight, bias, step, needs[0])


def _with_frozen_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, step: Step, need_dh: bool
) -> tuple[PairTerms, _Gradient]:
    """E·W is written where dh will be, and scaled by row once all coefficients are known."""
    head = _head(hidden, weight, bias, step, keep=False)
    everything = _Part(slice(0, len(step.targets)), step.cu_targets, step.pairs, step.ref_logps)
    if not need_dh:
        return _terms(joined(head, head.all_logps()), step, everything)[0], (None, None, None)
    # In E's dtype: in float16 the sums of a flat row of a large vocabulary would be infinite.
    products = torch.empty_like(hidden, dtype=head.narrow)
    terms, coefficients = _terms(joined(head, head.frozen(products)), step, everything)
    dh = products if head.narrow == hidden.dtype else torch.empty_like(hidden)
    scale_rows(dh, products, coefficients)
    return terms, (dh, None, None)


def _with_trained_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, step: Step, needs: _Needs
) -> tuple[PairTerms, _Gradient]:
    cu_targets = step.cu_targets.tolist()
    runs = [(0, len(cu_targets) - 1)] if step.loss.coupled else components(cu_targets, step.pairs.tolist())
    largest = max((cu_targets[stop] - cu_targets[start] for start, stop in runs), default=0)
    head = _head(hidden, weight, bias, step, keep=True, largest=largest)
    ring, ring_rows = head.kept(), head.plan.kept_rows
    gradients = head.gradients(needs)
    parts = []
    for start, stop in flushes(cu_targets, runs, ring_rows):
        first, last = cu_targets[start], cu_targets[stop]
        kept = slice(first, min(last, first + ring_rows))
        beyond = head.beyond(kept.stop, last)
        result = joined(head, [*head.keep(ring, kept), *(head.logps(rows) for rows in beyond)])
        inside = (step.pairs[:, 0] >= start) & (step.pairs[:, 0] < stop)
        ref_logps = step.ref_logps
        if ref_logps is not None:
            ref_logps = ref_logps[start:stop] if ref_logps.dim() == 1 else ref_logps[_on(inside, ref_logps)]
        local = step.cu_targets[start : stop + 1] - first
        part = _Part(slice(first, last), local, step.pairs[inside] - start, ref_logps)
        terms, coefficients = _terms(result, step, part)
        for rows, known in [(kept, ring), *((rows, None) for rows in beyond)]:
            here = slice(rows.start - first, rows.stop - first)
            gradients.add(rows, coefficients[here], result.sums[:, here], known)
        parts.append((inside, terms))
    return _joined(parts, step, head), gradients.finish()


def _head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, step: Step, *, keep: bool, largest: int | None = None
) -> Head | TiledHead:
    options, backend, most = step.options, step.backend, step.max_logits_bytes
    return head_of(hidden, weight, bias, step.targets, options, backend, most, keep=keep, largest=largest)


@dataclass(frozen=True)
class _Part:
    """Some whole components: their rows, cu_targets and pairs counted from the first of them, and their reference."""

    rows: slice
    cu_targets: Tensor
    pairs: Tensor
    ref_logps: Tensor | None


def _terms(result: RowResult, step: Step, part: _Part) -> tuple[PairTerms, Tensor]:
    """The terms of some components, and the row coefficients c (rows,) of their targets."""
    scale, log_sum_sq = result.sums[0], result.stats.get("log_sum_sq_probs")
    tokens = Tokens(result.logps, part.cu_targets, _counted(step, part.rows), log_sum_sq)
    terms = pair_terms(tokens, part.pairs, part.ref_logps, step.loss, step.totals, step.backend)
    # where, not times zero: an ignored row counts as 0 even where the loss is not finite
    return terms, torch.where(scale == 0, 0.0, terms.coefficients / step.totals.num_pairs * scale)


def _counted(step: Step, rows: slice) -> Tensor | None:
    """Which targets are tokens, for a loss that asks how many there are."""
    return step.targets[rows] != step.options.ignore_index if step.loss.needs_lengths else None


def _on(inside: Tensor, like: Tensor) -> Tensor:
    """The pairs inside, as an index on the device of `like`."""
    return inside.nonzero().squeeze(1).to(like.device, non_blocking=True)


def _joined(parts: list[tuple[Tensor, PairTerms]], step: Step, head: Head | TiledHead) -> PairTerms:
    """The flushes' terms in the order of the sequences and pairs."""

    def join(field: str, each_pair: bool) -> Tensor:
        values = [getattr(terms, field) for _, terms in parts]
        if not each_pair:
            return torch.cat(values)
        joined = head.hidden.new_empty((len(step.pairs), *values[0].shape[1:]), dtype=head.wide)
        for (inside, _), value in zip(parts, values, strict=True):
            joined[_on(inside, joined)] = value
        return joined

    weighted = step.loss.ld_alpha is not None
    by_pair = {"losses": True, "logps": weighted, "rewards": weighted, "coefficients": False}
    return PairTerms(**{field: join(field, by) for field, by in by_pair.items()})


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
        return (terms.losses.sum() / step.totals.num_pairs, *outputs)

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
    ref_logps: Tensor | None,
    earlier_rewards: Tensor | None,
    loss: str,
    num_pairs: int,
    num_chosen_tokens: int | None,
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
    decoded = PreferenceLoss.decode(loss)
    totals = StepTotals(num_pairs, num_chosen_tokens, earlier_rewards)
    options = LogitOptions(temperature, logit_scale, softcap, ignore_index, _stats(decoded))
    step = Step(targets, cu_targets, pairs, ref_logps, decoded, totals, options, backend, max_logits_bytes)
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
    ref_logps: Tensor | None,
    earlier_rewards: Tensor | None,
    loss: str,
    *arguments: Any,
) -> _Seven:
    need_dh, need_dw, need_db = arguments[-3:]

    def wide(*shape: int) -> Tensor:
        return hidden.new_empty(shape, dtype=accumulate_dtype(hidden.dtype))

    weighted = PreferenceLoss.decode(loss).ld_alpha is not None
    sums = (pairs.shape[0], 2) if weighted else (cu_targets.shape[0] - 1,)
    return (
        wide(),
        wide(pairs.shape[0]),
        wide(*sums),
        wide(*sums),
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
    ref_logps: Tensor | None = None,
    *,
    loss: PreferenceLoss | None = None,
    num_pairs: int | None = None,
    num_chosen_tokens: int | None = None,
    earlier_rewards: Tensor | None = None,
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
        ref_logps: (S,) float32, the reference's summed log-probs, nats; with ld_alpha (P, 2), what pair_logprobs makes
            of its token log-probs; None for kinds that need none.
        loss: kind and options, default PreferenceLoss(). One that couples the pairs of the call recomputes the rows of
            E that do not fit max_logits_bytes; every other kind does the three GEMMs and no more.
        num_pairs, num_chosen_tokens, earlier_rewards: as in preference_loss.
        bias, temperature, logit_scale, softcap, ignore_index, max_logits_bytes, backend: as in linear_logprobs, without
            the "reference" backend.

    Returns:
        PreferenceOutput: loss scalar, differentiable; losses (P,), logps and rewards (S,) or (P, 2), detached.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit, a pair that names a missing sequence.
        TypeError: a head weight that is no plain dense tensor.
    """
    loss = checked_loss(loss)
    options = LogitOptions(temperature, logit_scale, softcap, ignore_index, _stats(loss))
    check_tensors(hidden=hidden, weight=weight, bias=bias, targets=targets)
    check_tensors(cu_targets=cu_targets, pairs=pairs, ref_logps=ref_logps)
    hidden, weight, bias = autocast_inputs(hidden, weight, bias)
    check_head(hidden, weight, bias, targets)
    _check_pairs(targets, cu_targets, pairs, ref_logps, loss)
    chosen = choose_backend(backend, hidden.device, hidden.dtype)
    if chosen == "reference":
        raise ValueError("backend: expected auto, triton or torch; the reference is preference_loss of linear_logprobs")
    divisor = len(pairs) if num_pairs is None else num_pairs
    budget = DEFAULT_LOGITS_BYTES if max_logits_bytes is None else max_logits_bytes
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
            earlier_rewards,
            loss.encoded,
            divisor,
            num_chosen_tokens,
            temperature,
            logit_scale,
            softcap,
            ignore_index,
            chosen,
            budget,
            *needs,
        )[:4]
    else:
        totals = StepTotals(divisor, num_chosen_tokens, earlier_rewards)
        step = Step(targets, cu_targets, pairs, ref_logps, loss, totals, options, chosen, budget)
        values = LinearPreference.apply(hidden, weight, bias, step, needs)
    return PreferenceOutput(*values)


def _stats(loss: PreferenceLoss) -> tuple[str, ...]:
    """What the loss needs to know of a row beside its log-prob."""
    return ("log_sum_sq_probs",) if loss.use_weighting else ()


def _check_pairs(
    targets: Tensor, cu_targets: Tensor, pairs: Tensor, ref_logps: Tensor | None, loss: PreferenceLoss
) -> None:
    """What a call with known pairs needs; values are looked at where they lie on the CPU, outside a compiled graph."""
    for name, tensor in (("cu_targets", cu_targets), ("pairs", pairs)):
        if tensor.dtype != torch.int32 or not tensor.is_cpu:
            raise ValueError(f"{name}: expected int32 on the CPU, got {tensor.dtype} on {tensor.device}")
    if cu_targets.dim() != 1 or len(cu_targets) == 0:
        raise ValueError(f"cu_targets: expected shape (S+1,), got {tuple(cu_targets.shape)}")
    check_pair_names(pairs, len(cu_targets) - 1)
    check_reference(ref_logps, len(cu_targets) - 1, len(pairs), loss)
    if ref_logps is not None and ref_logps.device != targets.device:
        raise ValueError(f"ref_logps: expected on {targets.device} like targets, got on {ref_logps.device}")
    if torch.compiler.is_compiling():
        return
    bounds = cu_targets.tolist()
    if bounds[0] != 0 or bounds[-1] != len(targets) or any(b < a for a, b in zip(bounds[:-1], bounds[1:], strict=True)):
        raise ValueError(f"cu_targets: expected to rise from 0 to the {len(targets)} targets, got {bounds}")
