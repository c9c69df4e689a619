"""What every LM-head engine takes (HeadInputs), returns (RowResult) and can do (HeadEngine).

With z the logits after scaling, softcap and temperature, m = max z and S = Σ exp(z − m) of a row, y its target and g
the gradient that reaches its log-prob:

    logp = z_y − m − log S      E = (exp(z − m) − S·onehot(y))·dz/dx      c = −g·(logit_scale/temperature)/S
    dh = c ⊙ (E·W)              dW = Eᵀ·(c ⊙ h)                           db = Eᵀ·c

E never needs g, so its rows can be computed before g is known and kept until it is. dz/dx here is softcap's factor
1 − tanh² alone; its constant logit_scale/temperature is in c.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dpofast.head.options import LogitOptions
from dpofast.head.planning.dtypes import accumulate_dtype
from dpofast.head.planning.plan import HeadPlan, TilePlan


@dataclass(frozen=True)
class HeadInputs:
    """A call's hidden (N, D), weight (V, D), bias (V,) or None, targets (N,), and how logits become z."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    options: LogitOptions

    @property
    def wide(self) -> torch.dtype:
        """The dtype of logits, log-probs and sums."""
        return accumulate_dtype(self.hidden.dtype)

    def ignored(self, rows: slice = slice(None)) -> Tensor:
        """Which of these rows' targets do not count: (R,) bool."""
        return self.targets[rows] == self.options.ignore_index


class Needs(NamedTuple):
    """Which gradients a call needs."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def trains(self) -> bool:
        """Whether the head itself gets a gradient."""
        return self.weight or self.bias


# dh (N, D), dW (V, D) and db (V,) in the dtypes of hidden, weight and bias; None where not needed.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class RowSums(NamedTuple):
    """What forward knows of R rows and backward needs again, (R,) each in float32 or float64.

    A field that an engine does not use has no elements.

    Attributes:
        rescale: what turns a row's incoming gradient g into its coefficient c; 0 where the target is ignored.
        target_exp: E's entry at the target where E comes in tiles, which leave it out (TiledEngine).
        row_max: the maximum m that the row's sums are relative to (TiledEngine, ShardedEngine).
        sum_exp: S (ShardedEngine, whose backward computes E again from m and S of all ranks).
    """

    rescale: Tensor
    target_exp: Tensor
    row_max: Tensor
    sum_exp: Tensor

    def part(self, rows: slice) -> RowSums:
        """The same of some of the rows."""
        return RowSums(*(values[rows] for values in self))


@dataclass(frozen=True)
class RowResult:
    """logps (R,), sums, and the statistics that were asked for, (R,) each; all 0 where ignored."""

    logps: Tensor
    sums: RowSums
    stats: dict[str, Tensor]


class KeptRows(NamedTuple):
    """E of rows that wait for their coefficients.

    Attributes:
        exp: (K, V). TiledEngine stores, of every group of rows that went through the tiles together, tile after tile.
        tile_max: (tiles, K), the maximum that each tile's entries are relative to; without elements elsewhere.
    """

    exp: Tensor
    tile_max: Tensor


class GradientAccumulator(Protocol):
    """Accumulates dW and db over blocks of rows, and writes dh of each."""

    def add(self, rows: slice, coefficients: Tensor, sums: RowSums, kept: KeptRows | None) -> None:
        """Add the share of some rows.

        Args:
            rows: consecutive rows of the call.
            coefficients: c of these rows, (R,); rows with c = 0 may contain any values.
            sums: of these rows.
            kept: where the first R rows hold their E; None: E is computed again, of rows of one remaining chunk.
        """

    def finish(self) -> Gradients:
        """dh, dW and db in the dtypes of hidden, weight and bias; None where not needed."""


class HeadEngine(Protocol):
    """Computes log-probs and gradients of one call inside the byte budget of its plan."""

    @property
    def inputs(self) -> HeadInputs:
        """The call's tensors and options."""

    @property
    def plan(self) -> HeadPlan | TilePlan:
        """How many rows of everything fit in the budget."""

    @property
    def narrow(self) -> torch.dtype:
        """The dtype of E."""

    def new_kept(self) -> KeptRows:
        """Uninitialized buffers for the plan's kept_rows."""

    def empty_sums(self, rows: int) -> RowSums:
        """Uninitialized sums of that many rows."""

    def remaining_chunks(self, start: int, stop: int) -> list[slice]:
        """Rows [start, stop), which are not kept, in chunks that fit the scratch."""

    def logps(self, rows: slice) -> list[RowResult]:
        """Log-probs of any number of consecutive rows, whose E is not kept."""

    def all_logps(self) -> list[RowResult]:
        """Log-probs of all rows, for a call that needs no gradient."""

    def keep(self, kept: KeptRows, rows: slice) -> list[RowResult]:
        """Write E of rows into the first rows of `kept`."""

    def hidden_products(self, products: Tensor) -> list[RowResult]:
        """Write E·W of all rows into products (N, D) in E's dtype, so that dh = c ⊙ products."""

    def gradients(self, needs: Needs) -> GradientAccumulator:
        """Allocate the gradients that are needed."""


def row_coefficients(gradients: Tensor, rescale: Tensor, ignored: Tensor) -> Tensor:
    """c (R,) of rows with these incoming gradients (R,).

    where, not times zero: an ignored row counts as 0 even if the gradient that reaches it is not finite.
    """
    return torch.where(ignored, 0.0, gradients * rescale)


def concatenate(engine: HeadEngine, results: Sequence[RowResult]) -> RowResult:
    """The results of consecutive rows as one."""
    inputs = engine.inputs
    if len(results) == 1:
        return results[0]
    if not results:
        stats = {name: inputs.hidden.new_empty(0, dtype=stat_dtype(name, inputs.wide)) for name in inputs.options.stats}
        return RowResult(inputs.hidden.new_empty(0, dtype=inputs.wide), engine.empty_sums(0), stats)
    return RowResult(
        torch.cat([result.logps for result in results]),
        RowSums(*(torch.cat(parts) for parts in zip(*(result.sums for result in results), strict=True))),
        {name: torch.cat([result.stats[name] for result in results]) for name in inputs.options.stats},
    )


def stat_dtype(name: str, wide: torch.dtype) -> torch.dtype:
    """The dtype of a statistic."""
    return torch.bool if name == "is_top1" else wide
