"""Log-probs from hidden states and the head, with the fewest GEMMs that per-token gradients allow.

Buffers, both inside max_logits_bytes: a scratch of logits for a few hundred rows, and kept rows of E (rows.py). For an
incoming gradient g per target and c = −g·(dz/dx)/S:   dh = c ⊙ (E·W),   dW = Eᵀ·(c ⊙ h),   db = Eᵀ·c.

| needed                 | forward keeps                       | GEMMs (units of 2·N·D·V) |
|------------------------|-------------------------------------|--------------------------|
| no gradient            | nothing                             | 1                        |
| gradient to hidden     | E·W per row, (N, D)                 | 2                        |
| the head trains        | E for the rows that fit, recomputes | 3 + recomputed/N         |
| the head trains alone  | the same, without E·W               | 2 + recomputed/N         |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpofast.first_order import first_order_only
from dpofast.gemm import accumulate_dtype, add_transposed_product, logits_into, product
from dpofast.rows import LogitOptions, RowResult, row_logprobs

_ROW_MULTIPLE = 128
_SCRATCH_ROWS = 512


def default_logits_bytes(device: torch.device) -> int:
    """1 GiB on an accelerator, 256 MiB on the CPU."""
    return 256 << 20 if device.type == "cpu" else 1 << 30


@dataclass(frozen=True)
class HeadPlan:
    """How many rows of E forward keeps (the first ones), and how many rows of logits are scratch."""

    kept_rows: int
    scratch_rows: int

    @staticmethod
    def make(rows: int, vocab: int, dtype: torch.dtype, max_logits_bytes: int, *, keep: bool) -> HeadPlan:
        """Split the byte budget; ValueError where it does not hold a single row."""
        logit_bytes = vocab * accumulate_dtype(dtype).itemsize
        tile_bytes = 0 if exp_dtype(dtype) == accumulate_dtype(dtype) else vocab * exp_dtype(dtype).itemsize
        row_bytes = logit_bytes + tile_bytes
        if max_logits_bytes < row_bytes:
            raise ValueError(
                f"max_logits_bytes: expected at least one row of {vocab} logits, {row_bytes} bytes, "
                f"got {max_logits_bytes}: raise it"
            )
        affordable = max_logits_bytes // row_bytes
        if not keep:
            return HeadPlan(0, even_rows(rows, min(affordable, _SCRATCH_ROWS)))
        if tile_bytes == 0 and rows <= affordable:
            return HeadPlan(rows, 0)  # logits are written straight into the kept rows
        scratch = even_rows(rows, min(_SCRATCH_ROWS, max(1, affordable // 2)))
        kept = (max_logits_bytes - scratch * row_bytes) // (tile_bytes or logit_bytes)
        return HeadPlan(min(rows, kept), scratch)


def even_rows(rows: int, most: int) -> int:
    """The chunk size that splits `rows` evenly into chunks of at most `most`, a multiple of 128 where that fits."""
    if rows <= most:
        return max(rows, 1)
    even = -(-rows // -(-rows // most))
    rounded = -(-even // _ROW_MULTIPLE) * _ROW_MULTIPLE
    return rounded if rounded <= most else even


def exp_dtype(dtype: torch.dtype) -> torch.dtype:
    """E's dtype: the model's own, but float32 for float16, whose range neither e_y − S nor 1/S fits."""
    return torch.float32 if dtype == torch.float16 else dtype


def _chunks(start: int, stop: int, rows: int) -> list[slice]:
    return [slice(at, min(at + rows, stop)) for at in range(start, stop, max(rows, 1))]


class _Head:
    """hidden, weight, bias and targets of one call, and the row work on any slice of its rows."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: LogitOptions,
        backend: str,
    ) -> None:
        self.hidden, self.weight, self.bias, self.targets = hidden, weight, bias, targets
        self.options, self.backend = options, backend
        self.wide = accumulate_dtype(hidden.dtype)
        self.narrow = exp_dtype(hidden.dtype)

    def buffer(self, rows: int, dtype: torch.dtype) -> Tensor:
        return self.hidden.new_empty(rows, self.weight.shape[0], dtype=dtype)

    def exp_rows(self, rows: slice, logits: Tensor, exp: Tensor | None) -> RowResult:
        logits_into(logits, self.hidden[rows], self.weight)
        targets = self.targets[rows]
        return row_logprobs(logits, self.bias, targets, self.options, exp_out=exp, backend=self.backend)

    def hidden_product(self, exp: Tensor) -> Tensor:
        """E·W (R, D), in E's dtype."""
        return product(exp, self.weight)


class _Gradients:
    """Adds up dW and db over flushes of E rows and writes dh, c = −g·(dz/dx)/S being the row coefficients (N,)."""

    def __init__(self, head: _Head, coefficients: Tensor, needs: tuple[bool, bool, bool]) -> None:
        self.head, self.coefficients = head, coefficients
        need_dh, need_dw, need_db = needs
        self.dh = torch.empty_like(head.hidden) if need_dh else None
        self.dw = torch.empty_like(head.weight, dtype=head.wide) if need_dw else None
        self.db = coefficients.new_zeros(head.weight.shape[0]) if need_db else None
        self.flushed = False

    def flush(self, rows: slice, exp: Tensor) -> None:
        c = self.coefficients[rows].unsqueeze(1)
        if self.dh is not None:
            torch.mul(self.head.hidden_product(exp), c, out=self.dh[rows])
        if self.dw is not None:
            # where, not times zero: an ignored row's hidden may be NaN
            scaled = torch.where(c == 0, 0.0, c * self.head.hidden[rows]).to(self.head.narrow)
            add_transposed_product(self.dw, exp, scaled, first=not self.flushed)
        if self.db is not None:
            self.db.add_(torch.mv(exp.t().to(c.dtype), c.squeeze(1)))
        self.flushed = True


class LinearLogprobs(torch.autograd.Function):
    """(hidden, weight, bias, targets) -> logps and the statistics named in options; a gradient of logps only."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: LogitOptions,
        backend: str,
        max_logits_bytes: int,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor, ...]:
        """Log-probs (N,), then one (N,) tensor a statistic. needs says which of hidden, weight, bias get a gradient:

        the caller knows it, while needs_input_grad stays true under no_grad.
        """
        head = _Head(hidden, weight, bias, targets, options, backend)
        need_dh, need_dw, need_db = needs
        trains = need_dw or need_db
        plan = HeadPlan.make(len(targets), weight.shape[0], hidden.dtype, max_logits_bytes, keep=trains)

        kept = head.buffer(plan.kept_rows, head.narrow)
        logits = head.buffer(plan.scratch_rows, head.wide)
        tile = logits if head.narrow == head.wide else head.buffer(plan.scratch_rows, head.narrow)
        direct = head.narrow == head.wide
        products = []
        results = []
        kept_step = plan.scratch_rows or even_rows(plan.kept_rows, _SCRATCH_ROWS)
        for rows in _chunks(0, plan.kept_rows, kept_step):
            exp = kept[rows]
            results.append(head.exp_rows(rows, exp if direct else logits[: len(exp)], exp))
        for rows in _chunks(plan.kept_rows, len(targets), plan.scratch_rows):
            n = rows.stop - rows.start
            # E is wanted here only to be multiplied at once: a head that trains recomputes it in backward
            exp_now = tile[:n] if need_dh and not trains else None
            results.append(head.exp_rows(rows, logits[:n], exp_now))
            if exp_now is not None:
                products.append(head.hidden_product(exp_now))

        logps, scale = _joined(results, "logps", head), _joined(results, "scale", head)
        stats = [
            torch.cat([r.stats[name] for r in results]) if results else logps.new_empty(0) for name in options.stats
        ]
        ctx.mark_non_differentiable(*stats)
        ctx.options, ctx.backend, ctx.plan, ctx.needs = options, backend, plan, needs
        if trains or need_dh:
            ew = torch.cat(products) if products else None
            ctx.save_for_backward(hidden, weight, bias, targets, scale, kept if trains else None, ew)
        return (logps, *stats)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad_logps: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """dh, dW and db for the gradient of logps (N,)."""
        hidden, weight, bias, targets, scale, kept, ew = ctx.saved_tensors
        needs = ctx.needs
        # where, not times zero: an ignored row counts as 0 even if the gradient that reaches it is not finite
        coefficients = torch.where(scale == 0, 0.0, grad_logps * scale)
        nothing = (None,) * 5
        if not (needs[1] or needs[2]):
            dh = torch.zeros_like(hidden) if ew is None else (ew * coefficients.unsqueeze(1)).to(hidden.dtype)
            return (dh, None, None, *nothing)
        head = _Head(hidden, weight, bias, targets, ctx.options, ctx.backend)
        gradients = _Gradients(head, coefficients, needs)
        plan: HeadPlan = ctx.plan
        if plan.kept_rows:
            gradients.flush(slice(0, plan.kept_rows), kept)
        logits = head.buffer(plan.scratch_rows, head.wide)
        tile = logits if head.narrow == head.wide else head.buffer(plan.scratch_rows, head.narrow)
        for rows in _chunks(plan.kept_rows, len(targets), plan.scratch_rows):
            n = rows.stop - rows.start
            head.exp_rows(rows, logits[:n], tile[:n])
            gradients.flush(rows, tile[:n])
        if not gradients.flushed and gradients.dw is not None:
            gradients.dw.zero_()
        dw = None if gradients.dw is None else gradients.dw.to(weight.dtype)
        db = None if gradients.db is None or bias is None else gradients.db.to(bias.dtype)
        return (gradients.dh, dw, db, *nothing)


def _joined(results: list[RowResult], field: str, head: _Head) -> Tensor:
    parts = [getattr(result, field) for result in results]
    return torch.cat(parts) if parts else head.hidden.new_empty(0, dtype=head.wide)
