"""LM-head engine that computes E in whole rows with the kernels of kernels/: RowEngine, for the Triton backends.

Allocates scratch for a few hundred rows of logits, and rows of E that are kept until their coefficients are known.
Symbols are those of interface.py. RowBuffers and RowGradients also serve ShardedEngine.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from dpofast.head.engine.interface import Gradients, HeadInputs, KeptRows, Needs, RowResult, RowSums
from dpofast.head.engine.matmul import add_transposed_product, logits_into, product_into
from dpofast.head.engine.plan import SCRATCH_ROWS, HeadPlan, buffer_columns, chunks
from dpofast.head.engine.rows import kernel_rows


def exp_rows_like(weight: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """An uninitialized (rows, V) buffer on the weight's device, its rows as far apart as HeadPlan counts."""
    vocab = weight.shape[0]
    return weight.new_empty(rows, buffer_columns(vocab, weight.device), dtype=dtype)[:, :vocab]


def scale_rows(out: Tensor, rows: Tensor, coefficients: Tensor, step: int = SCRATCH_ROWS) -> None:
    """out (R, D) <- coefficients (R,) ⊙ rows (R, D), possibly in place: step rows at a time, for torch's own copies."""
    for part in chunks(0, len(rows), step):
        torch.mul(rows[part], coefficients[part].unsqueeze(1), out=out[part])


def hidden_product(
    out: Tensor, exp: Tensor, weight: Tensor, plan: HeadPlan, coefficients: Tensor | None = None
) -> None:
    """out (R, D) <- E·W, or with coefficients (R,) c ⊙ (E·W)."""
    for part in chunks(0, len(exp), plan.chunk_rows):
        c = None if coefficients is None else coefficients[part]
        product_into(out[part], exp[part], weight, plan.upcast_rows, c)


class RowBuffers:
    """The buffers of a HeadPlan; the scratch is allocated at its first use and reused for every chunk."""

    def __init__(self, inputs: HeadInputs, plan: HeadPlan) -> None:
        """Allocate nothing yet."""
        self.weight, self.plan, self.wide, self.narrow = inputs.weight, plan, inputs.wide, inputs.narrow

    @cached_property
    def _logits(self) -> Tensor:
        return exp_rows_like(self.weight, self.plan.scratch_rows, self.wide)

    @cached_property
    def _exp(self) -> Tensor:
        if self.narrow == self.wide:
            return self._logits
        return exp_rows_like(self.weight, self.plan.scratch_rows, self.narrow)

    def logits(self, rows: slice) -> Tensor:
        """Scratch (R, V) for the logits of at most scratch_rows rows."""
        return self._logits[: rows.stop - rows.start]

    def exp(self, rows: slice) -> Tensor:
        """Scratch (R, V) for E of at most scratch_rows rows: that of the logits where the dtypes are equal."""
        return self._exp[: rows.stop - rows.start]

    def new_kept(self) -> KeptRows:
        """Uninitialized buffers for the plan's kept rows of E."""
        return KeptRows(exp_rows_like(self.weight, self.plan.kept_rows, self.narrow), self.weight.new_empty(0))

    def kept_chunks(self, kept: KeptRows, rows: slice) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows of the call in chunks, with where their logits and their E go: the first rows of `kept`."""
        for part in chunks(0, rows.stop - rows.start, self.plan.chunk_rows):
            exp = kept.exp[part]
            logits = exp if self.narrow == self.wide else self._logits[: len(exp)]
            yield slice(rows.start + part.start, rows.start + part.stop), logits, exp


class RowEngine:
    """LM-head engine for one call (HeadEngine): E in whole rows, computed by Triton kernels."""

    def __init__(self, inputs: HeadInputs, plan: HeadPlan, backend: str) -> None:
        """Allocate nothing yet; backend is "triton" or "fused"."""
        self.inputs, self.plan, self.backend = inputs, plan, backend
        self._buffers = RowBuffers(inputs, plan)

    def new_kept(self) -> KeptRows:
        """Uninitialized buffers for the plan's kept rows of E."""
        return self._buffers.new_kept()

    def empty_sums(self, rows: int) -> RowSums:
        """Uninitialized sums of that many rows."""
        new = self.inputs.hidden.new_empty
        return RowSums(*(new(count, dtype=self.inputs.wide) for count in (rows, 0, 0, 0)))

    def remaining_chunks(self, start: int, stop: int) -> list[slice]:
        """Rows [start, stop), which are not kept, in chunks that fit the scratch."""
        return chunks(start, stop, self.plan.scratch_rows)

    def logps(self, rows: slice) -> list[RowResult]:
        """Log-probs of any number of consecutive rows, without E."""
        parts = self.remaining_chunks(rows.start, rows.stop)
        return [self._row_work(part, self._buffers.logits(part), None) for part in parts]

    def all_logps(self) -> list[RowResult]:
        """Log-probs of all rows, for a call that needs no gradient: the backend "fused" keeps logits off memory.

        Statistics need the logits, so with them "fused" works as "triton" does.
        """
        inputs = self.inputs
        if self.backend != "fused" or inputs.options.stats:
            return self.logps(slice(0, len(inputs.targets)))
        from dpofast.kernels.exp_gemm import exp_gemm

        logps = exp_gemm(
            inputs.hidden, inputs.weight, inputs.targets, bias=inputs.bias, **inputs.options.kernel_arguments()
        ).logps
        return [RowResult(logps, self.empty_sums(0)._replace(rescale=torch.zeros_like(logps)), {})]

    def keep(self, kept: KeptRows, rows: slice) -> list[RowResult]:
        """Write E of any number of rows into the first rows of kept, a chunk at a time."""
        return [self._row_work(*chunk) for chunk in self._buffers.kept_chunks(kept, rows)]

    def hidden_products(self, products: Tensor) -> list[RowResult]:
        """Write E·W into products (N, D), so that dh = c ⊙ products."""
        results = []
        for rows in self.remaining_chunks(0, len(self.inputs.targets)):
            exp = self._buffers.exp(rows)
            results.append(self._row_work(rows, self._buffers.logits(rows), exp))
            hidden_product(products[rows], exp, self.inputs.weight, self.plan)
        return results

    def recomputed_exp(self, rows: slice, sums: RowSums) -> Tensor:
        """E of at most scratch_rows rows, in the scratch: valid until the next call."""
        exp = self._buffers.exp(rows)
        self._row_work(rows, self._buffers.logits(rows), exp)
        return exp

    def gradients(self, needs: Needs) -> RowGradients:
        """Allocate the gradients that are needed."""
        return RowGradients(self, needs, once=self.plan.kept_rows == len(self.inputs.targets))

    def _row_work(self, rows: slice, logits: Tensor, exp: Tensor | None) -> RowResult:
        inputs = self.inputs
        logits_into(logits, inputs.hidden[rows], inputs.weight, self.plan.upcast_rows)
        return kernel_rows(logits, inputs.bias, inputs.targets[rows], inputs.options, exp_out=exp)


class _RowSource(Protocol):
    """What RowGradients asks of an engine whose E comes in whole rows."""

    @property
    def inputs(self) -> HeadInputs: ...

    @property
    def plan(self) -> HeadPlan: ...

    def recomputed_exp(self, rows: slice, sums: RowSums) -> Tensor: ...


class RowGradients:
    """Accumulates dW and db over blocks of rows of E and writes dh of each (GradientAccumulator).

    dW is accumulated in float32 (float64) and rounded at the end; one that a single block writes is rounded there.
    """

    def __init__(self, engine: _RowSource, needs: Needs, *, once: bool) -> None:
        """Allocate the gradients that are needed. once: a single block holds all rows."""
        self.engine = engine
        inputs = engine.inputs
        hidden, weight = inputs.hidden, inputs.weight
        self.dh = torch.empty_like(hidden) if needs.hidden else None
        self.dw = torch.empty_like(weight, dtype=weight.dtype if once else inputs.wide) if needs.weight else None
        self.db = hidden.new_zeros(weight.shape[0], dtype=inputs.wide) if needs.bias else None
        self._written = False  # dW, by the blocks before

    def add(self, rows: slice, coefficients: Tensor, sums: RowSums, kept: KeptRows | None) -> None:
        """Add the share of the first rows of kept, or of at most scratch_rows rows that are computed again."""
        exp = self.engine.recomputed_exp(rows, sums) if kept is None else kept.exp[: rows.stop - rows.start]
        self.add_exp(rows, exp, coefficients)

    def add_exp(self, rows: slice, exp: Tensor, coefficients: Tensor) -> None:
        """Add the share of rows: exp (R, V) is their E, coefficients (R,) is c."""
        inputs, plan = self.engine.inputs, self.engine.plan
        if self.dh is not None:
            hidden_product(self.dh[rows], exp, inputs.weight, plan, coefficients)
        if self.dw is not None:
            scaled = exp.new_empty(len(exp), inputs.hidden.shape[1])
            scale_rows(scaled, inputs.hidden[rows], coefficients, plan.chunk_rows)
            # filled, not times zero: an ignored row's hidden may be NaN
            scaled.masked_fill_(coefficients.unsqueeze(1) == 0, 0.0)
            add_transposed_product(self.dw, exp, scaled, plan.upcast_rows, first=not self._written)
        if self.db is not None:
            for block in chunks(0, len(exp), plan.temporary_rows):
                self.db.addmv_(exp[block].to(self.db.dtype).t(), coefficients[block])
        self._written = True

    def finish(self) -> Gradients:
        """dh, dW and db in the dtypes of hidden, weight and bias; None where not needed."""
        if self.dw is not None and not self._written:
            self.dw.zero_()
        dtype = self.engine.inputs.weight.dtype
        dw, db = (None if total is None else total.to(dtype) for total in (self.dw, self.db))
        return self.dh, dw, db
