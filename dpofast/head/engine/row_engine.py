"""LM-head engine that computes E in whole rows with the kernels of kernels/: RowEngine, for the Triton backends.

Logits are scratch, of a chunk of rows at a time (HeadPlan.chunk_rows); rows of E are kept until their coefficients are
known, or are scratch too, and the products with E take all of them at once. Symbols are those of interface.py.
RowBuffers and RowGradients also serve ShardedEngine.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from dpofast.head.engine.float16_scale import ProductScale
from dpofast.head.engine.interface import Gradients, HeadInputs, KeptRows, Needs, RowResult, RowSums
from dpofast.head.engine.matmul import add_transposed_product, logits_into, product_into
from dpofast.head.engine.rows import fused_rows, kernel_rows, scale_rows
from dpofast.head.planning.device import head_device
from dpofast.head.planning.plan import HeadPlan, buffer_columns, chunks, even_chunks

if TYPE_CHECKING:
    from dpofast.kernels.row_parts import TokenLogprobs


def exp_rows_like(weight: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """An uninitialized (rows, V) buffer on the weight's device, its rows as far apart as HeadPlan counts."""
    vocab = weight.shape[0]
    return weight.new_empty(rows, buffer_columns(vocab, weight.device), dtype=dtype)[:, :vocab]


class RowBuffers:
    """The buffers of a HeadPlan; the scratch is allocated at its first use and reused for every chunk."""

    def __init__(self, inputs: HeadInputs, plan: HeadPlan, narrow: torch.dtype) -> None:
        """Allocate nothing yet. narrow: the dtype of E."""
        self.weight, self.plan, self.wide, self.narrow = inputs.weight, plan, inputs.wide, narrow

    @cached_property
    def _logits(self) -> Tensor:
        if self.narrow == self.wide:
            return self._exp[: self.plan.chunk_rows]
        return exp_rows_like(self.weight, self.plan.chunk_rows, self.wide)

    @cached_property
    def _exp(self) -> Tensor:
        return exp_rows_like(self.weight, self.plan.scratch_rows, self.narrow)

    def exp(self, rows: slice) -> Tensor:
        """Scratch (R, V) for E of at most scratch_rows rows."""
        return self._exp[: rows.stop - rows.start]

    def new_kept(self) -> KeptRows:
        """Uninitialized buffers for the plan's kept rows of E."""
        return KeptRows(exp_rows_like(self.weight, self.plan.kept_rows, self.narrow), self.weight.new_empty(0))

    def logits(self, rows: slice) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the call in chunks, with where their logits go."""
        for part in even_chunks(rows.start, rows.stop, self.plan.chunk_rows):
            yield part, self._logits[: part.stop - part.start]

    def logits_and_exp(self, rows: slice, exp: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows of the call in chunks, with where their logits and their E go: the first rows of exp."""
        for part in even_chunks(rows.start, rows.stop, self.plan.chunk_rows):
            here = exp[part.start - rows.start : part.stop - rows.start]
            yield part, here if self.narrow == self.wide else self._logits[: len(here)], here


class RowEngine:
    """LM-head engine for one call (HeadEngine): E in whole rows, computed by Triton kernels."""

    triton = True

    def __init__(self, inputs: HeadInputs, plan: HeadPlan, *, fused: bool) -> None:
        """Allocate nothing yet. fused: one kernel makes E and log-probs of hidden states; logits are in no buffer."""
        self.inputs, self.plan, self._fused, self.narrow = inputs, plan, fused, inputs.hidden.dtype
        self._buffers = RowBuffers(inputs, plan, self.narrow)

    def new_kept(self) -> KeptRows:
        """Uninitialized buffers for the plan's kept rows of E."""
        return self._buffers.new_kept()

    def empty_sums(self, rows: int) -> RowSums:
        """Uninitialized sums of that many rows."""
        new = self.inputs.hidden.new_empty
        return RowSums(*(new(count, dtype=self.inputs.wide) for count in (rows, 0, 0, 0)))

    def remaining_chunks(self, start: int, stop: int) -> list[slice]:
        """Rows [start, stop), which are not kept, in chunks that fit the scratch."""
        return even_chunks(start, stop, self.plan.scratch_rows)

    def logps(self, rows: slice) -> list[RowResult]:
        """Log-probs of any number of consecutive rows, without E."""
        return self._results(rows, None)

    def all_logps(self) -> list[RowResult]:
        """Log-probs of all rows, for a call that needs no gradient."""
        return self.logps(slice(0, len(self.inputs.targets)))

    def keep(self, kept: KeptRows, rows: slice) -> list[RowResult]:
        """Write E of any number of rows into the first rows of kept."""
        results = self._results(rows, kept.exp)
        if self.plan.kept_rows == len(self.inputs.targets):
            self._buffers = RowBuffers(self.inputs, self.plan, self.narrow)  # frees the logits before dW is allocated
        return results

    def hidden_products(self, products: Tensor) -> list[RowResult]:
        """Write E·W into products (N, D), so that dh = c ⊙ products."""
        results = self._empty_results(len(self.inputs.targets))
        for rows in self.remaining_chunks(0, len(self.inputs.targets)):
            exp = self._buffers.exp(rows)
            self._compute(rows, exp, results.part(rows))
            product_into(products[rows], exp, self.inputs.weight, self.plan.upcast_rows)
        return [self._row_result(results)]

    def recomputed_exp(self, rows: slice, sums: RowSums) -> tuple[Tensor, Tensor]:
        """E of at most scratch_rows rows, in the scratch, valid until the next call; and what rescales it, (R,)."""
        exp = self._buffers.exp(rows)
        results = self._empty_results(len(exp))
        self._compute(rows, exp, results)
        return exp, results.rescale

    def gradients(self, needs: Needs) -> RowGradients:
        """Gradients to add to, which allocates them when they are first needed."""
        return RowGradients(self, needs, once=self.plan.kept_rows == len(self.inputs.targets))

    def _compute(self, rows: slice, exp: Tensor | None, out: TokenLogprobs) -> None:
        """Write the results of any number of rows to out, and their E into the first rows of exp where given."""
        inputs, buffers, start = self.inputs, self._buffers, rows.start
        if self._fused:
            fused_rows(inputs, rows, exp_out=exp, out=out)
            return
        without = ((*chunk, None) for chunk in buffers.logits(rows))
        for part, logits, here in without if exp is None else buffers.logits_and_exp(rows, exp):
            logits_into(logits, inputs.hidden[part], inputs.weight, self.plan.upcast_rows)
            results = out.part(slice(part.start - start, part.stop - start))
            kernel_rows(logits, inputs.bias, inputs.targets[part], inputs.options, exp_out=here, out=results)

    def _results(self, rows: slice, exp: Tensor | None) -> list[RowResult]:
        if rows.stop == rows.start:
            return []
        out = self._empty_results(rows.stop - rows.start)
        self._compute(rows, exp, out)
        return [self._row_result(out)]

    def _empty_results(self, rows: int) -> TokenLogprobs:
        from dpofast.kernels.row_parts import empty_result

        return empty_result(rows, self.inputs.options.stats, self.inputs.targets)

    def _row_result(self, results: TokenLogprobs) -> RowResult:
        return RowResult(results.logps, self.empty_sums(0)._replace(rescale=results.rescale), results.stats)


class _RowSource(Protocol):
    """What RowGradients asks of an engine whose E comes in whole rows."""

    triton: bool
    narrow: torch.dtype

    @property
    def inputs(self) -> HeadInputs: ...

    @property
    def plan(self) -> HeadPlan: ...

    def recomputed_exp(self, rows: slice, sums: RowSums) -> tuple[Tensor, Tensor]: ...


class RowGradients:
    """Accumulates dW and db over blocks of rows of E and writes dh of each (GradientAccumulator).

    dW is accumulated in float32 (float64) and rounded at the end; one that a single block writes is rounded there, but
    for float16, whose blocks are scaled (float16_scale.py). It is allocated by the first block, when whatever that
    block's logits needed is free again.
    """

    def __init__(self, engine: _RowSource, needs: Needs, *, once: bool) -> None:
        """Allocate dh and db where they are needed. once: a single block holds all rows."""
        self.engine, self.needs = engine, needs
        inputs = engine.inputs
        hidden, weight = inputs.hidden, inputs.weight
        self.dh = torch.empty_like(hidden) if needs.hidden else None
        self.dw: Tensor | None = None
        self.db = hidden.new_zeros(weight.shape[0], dtype=inputs.wide) if needs.bias else None
        self.product_scale = ProductScale(triton=engine.triton) if engine.narrow == torch.float16 else None
        self._dw_dtype = weight.dtype if once and self.product_scale is None else inputs.wide

    def add(self, rows: slice, coefficients: Tensor, sums: RowSums, kept: KeptRows | None) -> None:
        """Add the share of the first rows of kept, or of at most scratch_rows rows that are computed again."""
        if kept is None:
            exp, rescale = self.engine.recomputed_exp(rows, sums)
            # Forward, which wrote no E of these rows, may have taken another shift. where: an ignored row has 0/0.
            coefficients = torch.where(coefficients == 0, 0.0, coefficients * (rescale / sums.rescale))
        else:
            exp = kept.exp[: rows.stop - rows.start]
        self.add_exp(rows, exp, coefficients)

    def add_exp(self, rows: slice, exp: Tensor, coefficients: Tensor) -> None:
        """Add the share of rows: exp (R, V) is their E, coefficients (R,) is c."""
        inputs, plan, triton = self.engine.inputs, self.engine.plan, self.engine.triton
        if self.dh is not None:
            dh = self.dh[rows]
            # Scaled before it is rounded, but on a CPU, whose 16-bit products are rounded.
            widens = exp.dtype != dh.dtype or head_device(exp.device).widens
            product = torch.empty_like(dh, dtype=inputs.wide) if widens and dh.dtype != inputs.wide else dh
            product_into(product, exp, inputs.weight, plan.upcast_rows)
            scale_rows(dh, product, coefficients, triton=triton)
            del product
        if self.needs.weight:
            hidden, factors = inputs.hidden[rows], coefficients
            if self.product_scale is not None:
                factors = self.product_scale.follow(self.dw, hidden, coefficients)
            scaled = exp.new_empty(len(exp), hidden.shape[1])
            scale_rows(scaled, hidden, factors, triton=triton, zero=True)
            first = self.dw is None
            if self.dw is None:
                self.dw = torch.empty_like(inputs.weight, dtype=self._dw_dtype)
            add_transposed_product(self.dw, exp, scaled, plan.upcast_rows, first=first)
        if self.db is not None:
            for block in chunks(0, len(exp), plan.temporary_rows):
                self.db.addmv_(exp[block].to(self.db.dtype).t(), coefficients[block])

    def finish(self) -> Gradients:
        """dh, dW and db in the dtypes of hidden, weight and bias; None where not needed."""
        weight, dw = self.engine.inputs.weight, self.dw
        if dw is None and self.needs.weight:
            dw = torch.zeros_like(weight)
        elif dw is not None and self.product_scale is not None:
            dw = self.product_scale.rounded(dw, weight.dtype)
        dw, db = (None if total is None else total.to(weight.dtype) for total in (dw, self.db))
        return self.dh, dw, db
