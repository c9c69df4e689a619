"""LM-head engine for the torch backend: products over tiles of the vocabulary, with many rows in each of them.

A tile of logits (R, v) becomes E while it is in cache (online_softmax.py), so the row work is all but free; a product
packs its part of the head once for all R rows; and a call without a gradient, or with one to hidden states alone,
needs memory for R·v logits instead of whole rows. With e_y the entry of E at the target (RowSums.target_exp):

    dh = c ⊙ (Σ_tiles E·W + e_y·W_y)      dW = Eᵀ·(c ⊙ h), and c·e_y·h added at the targets      db likewise

E of a tile is relative to the maximum m of the tiles up to it. E·W is accumulated while m rises, and rescaled each
time. Kept rows of E (K·V elements, tile after tile for every R rows) come with their m of every tile, so that
c·exp(m − m_last) scales h for its dW. e_y is −Σ_{v≠y} exp(z_v − m), which the tiles leave out.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from dpofast.head.engine.interface import Gradients, HeadInputs, KeptRows, Needs, RowResult, RowSums
from dpofast.head.engine.online_softmax import OnlineSoftmax, rescale_factor
from dpofast.head.engine.workspace import Scratch
from dpofast.head.planning.dtypes import scaleless_exp_dtype
from dpofast.head.planning.plan import TilePlan, chunks

_LOGITS, _EXP, _UPCAST, _KEPT, _DW = Scratch(), Scratch(), Scratch(), Scratch(), Scratch()


class _ExpTile(NamedTuple):
    """A tile of E: its columns, E (R, v), exp(m_before − m) (R, 1) and the m (R, 1) that it is relative to."""

    columns: slice
    exp: Tensor
    rescale: Tensor
    maximum: Tensor


class TiledEngine:
    """LM-head engine for one call (HeadEngine): E in tiles of the vocabulary, computed by torch."""

    def __init__(self, inputs: HeadInputs, plan: TilePlan) -> None:
        """Allocate nothing yet."""
        self.inputs, self.plan = inputs, plan
        self.wide, self.narrow = inputs.wide, scaleless_exp_dtype(inputs.hidden.dtype)
        self.tiles = chunks(0, inputs.weight.shape[0], plan.columns)
        self._upcast_start = -1

    @cached_property
    def _logits(self) -> Tensor:
        return _LOGITS.empty((self.plan.rows * self.plan.columns,), like=self.inputs.weight, dtype=self.wide)

    @cached_property
    def _exp(self) -> Tensor:
        if self.narrow == self.wide:
            return self._logits
        return _EXP.empty((self.plan.rows * self.plan.columns,), like=self.inputs.weight, dtype=self.narrow)

    @cached_property
    def _upcast(self) -> Tensor:
        weight = self.inputs.weight
        return _UPCAST.empty((self.plan.columns, weight.shape[1]), like=weight, dtype=self.wide)

    def wide_weight(self, tile: slice) -> Tensor:
        """The tile's rows of the head in float32 or float64: valid until the next tile's."""
        weight = self.inputs.weight
        if weight.dtype == self.wide:
            return weight[tile]
        upcast = self._upcast[: tile.stop - tile.start]
        if self._upcast_start != tile.start:
            upcast.copy_(weight[tile])
            self._upcast_start = tile.start
        return upcast

    def wide_exp(self, exp: Tensor) -> Tensor:
        """A tile of E in float32 or float64, in the scratch where it is narrower."""
        return exp if exp.dtype == self.wide else _view(self._logits, *exp.shape).copy_(exp)

    def new_kept(self) -> KeptRows:
        """Uninitialized buffers for the plan's kept rows."""
        rows, weight = self.plan.kept_rows, self.inputs.weight
        return KeptRows(
            _KEPT.empty((rows, weight.shape[0]), like=weight, dtype=self.narrow),
            weight.new_empty(len(self.tiles), rows, dtype=self.wide),
        )

    def empty_sums(self, rows: int) -> RowSums:
        """Uninitialized sums of that many rows."""
        new = self.inputs.hidden.new_empty
        return RowSums(*(new(count, dtype=self.wide) for count in (rows, rows, rows, 0)))

    def remaining_chunks(self, start: int, stop: int) -> list[slice]:
        """Rows [start, stop), which are not kept, in the chunks that go through a tile at once."""
        return chunks(start, stop, self.plan.rows)

    def logps(self, rows: slice) -> list[RowResult]:
        """Log-probs of any number of consecutive rows, without E."""
        return [self._logps(part) for part in self.remaining_chunks(rows.start, rows.stop)]

    def _logps(self, rows: slice) -> RowResult:
        sums = self._sums(rows)
        for _ in self._computed(rows, sums, [None] * len(self.tiles)):
            pass
        return sums.finish()

    def all_logps(self) -> list[RowResult]:
        """Log-probs of all rows, for a call that needs no gradient."""
        return self.logps(slice(0, len(self.inputs.targets)))

    def keep(self, kept: KeptRows, rows: slice) -> list[RowResult]:
        """Write E of rows into the first rows of kept."""
        results = []
        for part in chunks(0, rows.stop - rows.start, self.plan.rows):
            here = slice(rows.start + part.start, rows.start + part.stop)
            sums = self._sums(here)
            for number, tile in enumerate(self._computed(here, sums, self._kept_tiles(kept, part))):
                kept.tile_max[number, part] = tile.maximum.squeeze(1)
            results.append(sums.finish())
        return results

    def hidden_products(self, products: Tensor) -> list[RowResult]:
        """Write E·W, with E's entry at the target, into products (N, D), so that dh = c ⊙ products."""
        results = []
        for rows in self.remaining_chunks(0, len(self.inputs.targets)):
            sums = self._sums(rows)
            total = _HiddenGradient(self, rows, products[rows])
            for tile in self._computed(rows, sums, self._scratch_tiles(rows)):
                total.add(tile)
            results.append(sums.finish())
            total.finish(torch.where(sums.ignored, 0.0, 1.0), results[-1].sums.target_exp)
        return results

    def recomputed_tiles(self, rows: slice) -> Iterator[_ExpTile]:
        """Tiles of E of at most plan.rows rows."""
        return self._computed(rows, self._sums(rows), self._scratch_tiles(rows))

    def kept_tiles(self, kept: KeptRows, part: slice) -> Iterator[_ExpTile]:
        """The same of kept rows `part`, which went through the tiles together."""
        before = kept.tile_max[0, part].unsqueeze(1)
        for number, (columns, exp) in enumerate(zip(self.tiles, self._kept_tiles(kept, part), strict=True)):
            maximum = kept.tile_max[number, part].unsqueeze(1)
            yield _ExpTile(columns, exp, rescale_factor(before, maximum), maximum)
            before = maximum

    def gradients(self, needs: Needs) -> TileGradients:
        """Allocate the gradients that are needed."""
        return TileGradients(self, needs)

    def _sums(self, rows: slice) -> OnlineSoftmax:
        return OnlineSoftmax(self.inputs, rows, self.plan.block_rows)

    def _scratch_tiles(self, rows: slice) -> list[Tensor]:
        n = rows.stop - rows.start
        return [_view(self._exp, n, tile.stop - tile.start) for tile in self.tiles]

    def _kept_tiles(self, kept: KeptRows, part: slice) -> list[Tensor]:
        """Where kept rows `part` have their tiles of E: one after the other, so that each is contiguous."""
        flat, n = kept.exp[part].view(-1), part.stop - part.start
        return [flat[n * tile.start : n * tile.stop].view(n, -1) for tile in self.tiles]

    def _computed(self, rows: slice, sums: OnlineSoftmax, exps: list[Tensor] | list[None]) -> Iterator[_ExpTile]:
        """Compute one tile after the other, E in its place of exps; where that is None only the sums are wanted."""
        hidden = self.inputs.hidden[rows].to(self.wide)
        for tile, exp in zip(self.tiles, exps, strict=True):
            if exp is not None and exp.dtype == self.wide:
                logits = exp  # kept rows: in their place at once, which writes them to memory once
            else:
                logits = _view(self._logits, len(hidden), tile.stop - tile.start)
            torch.mm(hidden, self.wide_weight(tile).t(), out=logits)
            bias = None if self.inputs.bias is None else self.inputs.bias[tile]
            rescale = sums.add(logits, tile.start, bias, exp)
            yield _ExpTile(tile, logits if exp is None else exp, rescale, sums.maximum)


def _view(flat: Tensor, rows: int, columns: int) -> Tensor:
    return flat[: rows * columns].view(rows, columns)


class _HiddenGradient:
    """Accumulates out (R, D), dh of some rows, tile by tile in float32 or float64, and rounds it once.

    E·W of a tile comes in E's dtype: a 16-bit head's is rounded before it is added, which costs no more than E's own
    rounding did.
    """

    def __init__(self, engine: TiledEngine, rows: slice, out: Tensor) -> None:
        """out is written by finish, and is where the sum grows if it has the sum's dtype."""
        self.engine, self.rows, self.out = engine, rows, out
        self.total = out.zero_() if out.dtype == engine.wide else torch.zeros_like(out, dtype=engine.wide)

    def add(self, tile: _ExpTile) -> None:
        """Add a tile's share, after rescaling what the tiles before it gave."""
        self.total.mul_(tile.rescale)
        if tile.exp.dtype == self.engine.wide:
            self.total.addmm_(tile.exp, self.engine.wide_weight(tile.columns))
        else:
            self.total.add_(torch.mm(tile.exp, self.engine.inputs.weight[tile.columns]))

    def finish(self, factor: Tensor, at_target: Tensor) -> None:
        """Multiply by factor (R,), c relative to the last tile's m, and add at_target (R,), c·e_y, times W_y.

        Rows with factor 0 may contain any values.
        """
        inputs = self.engine.inputs
        self.total.mul_(factor.unsqueeze(1)).masked_fill_((factor == 0).unsqueeze(1), 0.0)
        safe_targets = inputs.targets[self.rows].clamp(0, len(inputs.weight) - 1)
        target_rows = inputs.weight[safe_targets].to(self.engine.wide)
        self.total.addcmul_(target_rows, at_target.unsqueeze(1))
        if self.out is not self.total:
            self.out.copy_(self.total)


class TileGradients:
    """Accumulates dW and db over blocks of rows and writes dh of each (GradientAccumulator).

    dW is accumulated in float32 (float64) and rounded at the end; one that is written once is rounded there.
    """

    def __init__(self, engine: TiledEngine, needs: Needs) -> None:
        """Allocate the gradients that are needed: dW is written by its first product, without zeros before."""
        self.engine = engine
        hidden, weight, plan = engine.inputs.hidden, engine.inputs.weight, engine.plan
        once = plan.kept_rows == len(engine.inputs.targets) <= plan.rows
        self.dh = torch.empty_like(hidden) if needs.hidden else None
        self.dw: Tensor | None = None
        if needs.weight:
            self.dw = _DW.empty(weight.shape, like=weight, dtype=weight.dtype if once else engine.wide)
        self._written = False  # dW, by the rows before
        self.db = hidden.new_zeros(len(weight), dtype=engine.wide) if needs.bias else None

    def add(self, rows: slice, coefficients: Tensor, sums: RowSums, kept: KeptRows | None) -> None:
        """Add the share of the first rows of kept, or of rows that are computed again."""
        engine = self.engine
        for part in chunks(0, rows.stop - rows.start, engine.plan.rows):
            here = slice(rows.start + part.start, rows.start + part.stop)
            tiles = engine.recomputed_tiles(here) if kept is None else engine.kept_tiles(kept, part)
            self._add(here, tiles, coefficients[part], sums.part(part))
            self._written = True

    def _add(self, rows: slice, tiles: Iterator[_ExpTile], coefficients: Tensor, sums: RowSums) -> None:
        engine, inputs = self.engine, self.engine.inputs
        targets = inputs.targets[rows]
        no_share, at_target = coefficients == 0, coefficients * sums.target_exp
        dh = None if self.dh is None else _HiddenGradient(engine, rows, self.dh[rows])
        factor = coefficients
        if self.dw is not None:
            # filled, not times zero: an ignored row's hidden may be NaN, and so its m
            hidden = inputs.hidden[rows].to(engine.wide).masked_fill(no_share.unsqueeze(1), 0.0)
            scaled = torch.empty_like(hidden)
        for tile in tiles:
            factor = rescale_factor(tile.maximum.squeeze(1), sums.row_max)
            factor.mul_(coefficients).masked_fill_(no_share, 0.0)
            if dh is not None:
                dh.add(tile)
            if self.dw is None and self.db is None:
                continue
            exp, columns = engine.wide_exp(tile.exp), tile.columns
            if self.db is not None:
                self.db[columns].addmv_(exp.t(), factor)
            if self.dw is not None:
                torch.mul(hidden, factor.unsqueeze(1), out=scaled)
                own = ((targets >= columns.start) & (targets < columns.stop)).nonzero().squeeze(1)
                own_hidden = hidden[own].mul_(at_target[own].unsqueeze(1))
                self._add_to_dw(columns, exp, scaled, targets[own] - columns.start, own_hidden)
        if self.db is not None:
            self.db.index_add_(0, targets.clamp(0, len(self.db) - 1), at_target)
        if dh is not None:
            dh.finish(factor, at_target)

    def _add_to_dw(self, tile: slice, exp: Tensor, scaled: Tensor, own: Tensor, own_hidden: Tensor) -> None:
        """Add Eᵀ·scaled to the tile's dW, and own_hidden (n, D) at the targets `own` (n,) that lie in the tile."""
        assert self.dw is not None
        dw = self.dw[tile]
        if self._written:
            total = (dw if dw.dtype == scaled.dtype else dw.to(scaled.dtype)).addmm_(exp.t(), scaled)
        else:
            total = torch.mm(exp.t(), scaled, out=dw if dw.dtype == scaled.dtype else None)
        total.index_add_(0, own, own_hidden)
        if total is not dw:
            dw.copy_(total)

    def finish(self) -> Gradients:
        """dh, dW and db in the dtypes of hidden, weight and bias; None where not needed."""
        if self.dw is not None and not self._written:  # a call without rows
            self.dw.zero_()
        dtype = self.engine.inputs.weight.dtype
        dw, db = (None if total is None else total.to(dtype) for total in (self.dw, self.db))
        return self.dh, dw, db
