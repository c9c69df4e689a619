"""Forward and backward of per-token log-probs through any LM-head engine.

| needed                 | forward keeps                       | GEMMs (units of 2·N·D·V) |
|------------------------|-------------------------------------|--------------------------|
| no gradient            | nothing                             | 1                        |
| gradient to hidden     | E·W per row, (N, D)                 | 2                        |
| the head trains        | E for the rows that fit, recomputes | 3 + recomputed/N         |
| the head trains alone  | the same, without E·W               | 2 + recomputed/N         |
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dpofast.head.engine.interface import (
    GradientAccumulator,
    Gradients,
    HeadEngine,
    KeptRows,
    Needs,
    RowResult,
    RowSums,
    concatenate,
)


class ForwardResult(NamedTuple):
    """What forward computed and backward needs.

    Attributes:
        rows: log-probs, sums and statistics of all N rows.
        kept: E of the first kept_rows rows, where the head trains.
        products: E·W (N, D), where hidden alone needs a gradient; else (0,).
    """

    rows: RowResult
    kept: KeptRows
    products: Tensor


def empty_products(engine: HeadEngine, needs: Needs) -> Tensor:
    """The uninitialized buffer for ForwardResult.products."""
    hidden, frozen = engine.inputs.hidden, needs.hidden and not needs.trains
    shape = (hidden.shape[0], engine.inputs.weight.shape[1]) if frozen else (0,)
    return hidden.new_empty(shape, dtype=engine.narrow)


def forward(engine: HeadEngine, needs: Needs) -> ForwardResult:
    """Log-probs of all rows, and what the gradients that are needed will take."""
    kept, products = engine.new_kept(), empty_products(engine, needs)
    if needs.trains:
        return ForwardResult(keep_and_recompute(engine, slice(0, len(engine.inputs.targets)), kept), kept, products)
    results = engine.hidden_products(products) if needs.hidden else engine.all_logps()
    return ForwardResult(concatenate(engine, results), kept, products)


def backward(engine: HeadEngine, needs: Needs, coefficients: Tensor, sums: RowSums, kept: KeptRows) -> Gradients:
    """dh, dW and db of a head that trains, for the coefficients c (N,) of all rows; None where not needed."""
    gradients = engine.gradients(needs)
    accumulate(engine, gradients, slice(0, len(coefficients)), coefficients, sums, kept)
    return gradients.finish()


def keep_and_recompute(engine: HeadEngine, rows: slice, kept: KeptRows) -> RowResult:
    """Log-probs of consecutive rows: E of as many as `kept` holds is kept, accumulate computes that of others again."""
    split = _split(engine, rows)
    results = [*engine.keep(kept, slice(rows.start, split)), *engine.logps(slice(split, rows.stop))]
    return concatenate(engine, results)


def accumulate(
    engine: HeadEngine,
    gradients: GradientAccumulator,
    rows: slice,
    coefficients: Tensor,
    sums: RowSums,
    kept: KeptRows,
) -> None:
    """Add the share of rows that went through keep_and_recompute; coefficients c (R,) and sums are of these rows."""
    split = _split(engine, rows)
    parts: list[tuple[slice, KeptRows | None]] = [(slice(rows.start, split), kept)] if split > rows.start else []
    parts += [(part, None) for part in engine.remaining_chunks(split, rows.stop)]
    for part, known in parts:
        here = slice(part.start - rows.start, part.stop - rows.start)
        gradients.add(part, coefficients[here], sums.part(here), known)


def _split(engine: HeadEngine, rows: slice) -> int:
    """Where the rows end whose E is kept."""
    return min(rows.stop, rows.start + engine.plan.kept_rows)
