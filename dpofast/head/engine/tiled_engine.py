"""One call's head on the torch backend: products over tiles of the vocabulary, with many rows in each of them.

A tile of logits (R, v) becomes E while it is in cache (online_sums.py), so the row work is all but free; a product
packs its part of the head once for all R rows; and a call without a gradient, or with one to hidden states alone,
needs memory for R·v logits instead of whole rows:

    dh = c ⊙ (Σ_tiles E·W + pull·W_y)      dW = Eᵀ·(c ⊙ h), and c·pull·h added at the targets      db likewise

E of a tile is relative to the maximum m of the tiles up to it. E·W is added up while m rises, shrinking what is there;
rows of E that are kept (K·V elements, tile after tile for every R rows) come with their m of every tile, so that
c·exp(m − m_last) scales h for its dW. pull is −Σ_{v≠y} exp(z_v − m): E at the target, which the tiles leave out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dpofast.head.engine.matmul import accumulate_dtype
from dpofast.head.engine.online_softmax import OnlineSums
from dpofast.head.engine.row_engine import Kept, chunks, even_rows, exp_dtype, too_few_bytes
from dpofast.head.engine.rows import CACHE_BYTES, RowResult
from dpofast.head.engine.workspace import Scratch
from dpofast.head.options import LogitOptions

# Measured (2 cores, D = 1,024): products are fastest from 2,048 rows on; tiles of 4,096 columns gain up to 7 % over
# 8,192, and 2 % over 2,048.
_ROWS, _COLUMNS = 2048, 4096
# Of E at a time where no more are needed at once: further rows gain less than their memory is worth.
_KEPT_ROWS = 1024
_LOGITS, _EXP, _UPCAST, _KEPT, _DW = Scratch(), Scratch(), Scratch(), Scratch(), Scratch()


@dataclass(frozen=True)
class TilePlan:
    """How a call is cut: rows go through a tile of columns at once, block_rows of them through its row work.

    kept_rows of E are kept at a time.
    """

    rows: int
    columns: int
    block_rows: int
    kept_rows: int

    @staticmethod
    def make(
        rows: int,
        weight: Tensor,
        max_logits_bytes: int,
        options: LogitOptions,
        *,
        keep: bool,
        largest: int | None = None,
    ) -> TilePlan:
        """Split the byte budget; ValueError where it does not hold a single row.

        Counted are logits, E, and copies of rows and of the head's tiles beside them: as HeadPlan.make counts.

        Args:
            rows: those of the call.
            weight: (V, D); its shape and dtype count.
            max_logits_bytes: the budget.
            options: softcap and statistics need temporaries.
            keep: the head trains, so rows of E are kept for it.
            largest: the most rows that must be kept at the same time, None for all.
        """
        (vocab, width), most = weight.shape, max_logits_bytes
        wide, narrow = accumulate_dtype(weight.dtype).itemsize, exp_dtype(weight.dtype).itemsize
        # A 16-bit head: its tile in float32, and dW's before it is rounded; E in its own dtype.
        upcasts = weight.dtype.itemsize < wide
        tile_bytes = upcasts * (1 + keep) * width * wide
        column_bytes = wide + (narrow if narrow < wide else 0)
        temporaries = (options.softcap is not None) + bool({"entropy", "log_sum_sq_probs"} & {*options.stats})
        # (R, D) at once: W_y; for dW h and c ⊙ h; in 16 bits also h, dh, and W_y before it is upcast.
        copied_bytes = width * (wide * (1 + 2 * keep + 2 * upcasts) + upcasts * weight.dtype.itemsize)
        db_bytes = keep * vocab * wide  # before it is rounded
        least = max(vocab * wide, db_bytes + copied_bytes + tile_bytes + column_bytes + temporaries * wide)
        if most < least:
            raise too_few_bytes(vocab, least, most)
        room = most - db_bytes - copied_bytes
        together = max(1, min(rows, _ROWS))
        columns = even_rows(vocab, max(1, min(_COLUMNS, room // 4 // (tile_bytes + together * column_bytes))))
        block = max(1, min(CACHE_BYTES, room // 8) // (columns * wide * max(temporaries, 1)))
        fixed = db_bytes + columns * (tile_bytes + temporaries * block * wide)
        row_bytes = columns * column_bytes + copied_bytes
        affordable = (most - fixed) // row_bytes
        if not keep:
            return TilePlan(even_rows(rows, min(_ROWS, affordable)), columns, block, 0)
        kept_bytes = vocab * narrow + -(-vocab // columns) * wide
        if upcasts and rows * (kept_bytes + row_bytes) <= most - fixed:
            return TilePlan(max(rows, 1), columns, block, rows)  # no float32 dW beside the rounded one
        needed = rows if largest is None else min(rows, max(largest, _KEPT_ROWS))
        at_once = even_rows(needed, min(_ROWS, max(1, affordable // 4)))
        kept = (most - fixed - at_once * row_bytes) // kept_bytes
        ring = rows if largest is None else max(largest, even_rows(rows, needed))
        return TilePlan(at_once, columns, block, min(rows, ring, kept))


class TiledHead:
    """hidden (N, D), weight (V, D), bias (V,) or None and targets (N,) of one call: the interface is that of Head."""

    SUMS = 3

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: LogitOptions,
        plan: TilePlan,
    ) -> None:
        """Nothing is allocated yet: scratch is at its first use, kept rows are the caller's."""
        self.hidden, self.weight, self.bias, self.targets = hidden, weight, bias, targets
        self.options, self.plan = options, plan
        self.wide, self.narrow = accumulate_dtype(hidden.dtype), exp_dtype(hidden.dtype)
        self.tiles = chunks(0, weight.shape[0], plan.columns)
        self._upcast_start = -1

    @cached_property
    def _logits(self) -> Tensor:
        return _LOGITS.empty((self.plan.rows * self.plan.columns,), like=self.weight, dtype=self.wide)

    @cached_property
    def _exp(self) -> Tensor:
        if self.narrow == self.wide:
            return self._logits
        return _EXP.empty((self.plan.rows * self.plan.columns,), like=self.weight, dtype=self.narrow)

    @cached_property
    def _upcast(self) -> Tensor:
        return _UPCAST.empty((self.plan.columns, self.weight.shape[1]), like=self.weight, dtype=self.wide)

    def wide_weight(self, tile: slice) -> Tensor:
        """The tile's rows of the head in float32 or float64: valid until the next tile's."""
        if self.weight.dtype == self.wide:
            return self.weight[tile]
        upcast = self._upcast[: tile.stop - tile.start]
        if self._upcast_start != tile.start:
            upcast.copy_(self.weight[tile])
            self._upcast_start = tile.start
        return upcast

    def wide_exp(self, exp: Tensor) -> Tensor:
        """A tile of E in float32 or float64, in the scratch where it is narrower."""
        return exp if exp.dtype == self.wide else _tile(self._logits, *exp.shape).copy_(exp)

    def beyond(self, start: int, stop: int) -> list[slice]:
        """Rows [start, stop) that are not kept, in the slices that go through a tile at once."""
        return chunks(start, stop, self.plan.rows)

    def kept(self) -> Kept:
        """Buffers for the plan's kept rows: E (K, V), and m of every tile (tiles, K)."""
        rows, vocab = self.plan.kept_rows, self.weight.shape[0]
        return (
            _KEPT.empty((rows, vocab), like=self.weight, dtype=self.narrow),
            self.weight.new_empty(len(self.tiles), rows, dtype=self.wide),
        )

    def sums(self, rows: slice) -> OnlineSums:
        """Sums of these rows before the first tile."""
        targets, vocab = self.targets[rows], self.weight.shape[0]
        return OnlineSums(targets, vocab, self.options, self.wide, self.plan.block_rows)

    def logps(self, rows: slice) -> RowResult:
        """Log-probs of at most plan.rows rows, without E."""
        sums = self.sums(rows)
        for _ in self._computed(rows, sums, [None] * len(self.tiles)):
            pass
        return sums.finish()

    def all_logps(self) -> list[RowResult]:
        """Log-probs of all rows, for a call that needs no gradient."""
        return [self.logps(rows) for rows in self.beyond(0, len(self.targets))]

    def keep(self, kept: Kept, rows: slice) -> list[RowResult]:
        """E of rows into the first rows of kept."""
        results = []
        for part in chunks(0, rows.stop - rows.start, self.plan.rows):
            here = slice(rows.start + part.start, rows.start + part.stop)
            sums = self.sums(here)
            computed = self._computed(here, sums, self._kept_tiles(kept, part))
            for number, _ in enumerate(computed):
                kept[1][number, part] = sums.maximum.squeeze(1)
            results.append(sums.finish())
        return results

    def frozen(self, products: Tensor) -> list[RowResult]:
        """products (N, D) <- E·W with its entry at the target, so that dh = c ⊙ products."""
        results = []
        for rows in self.beyond(0, len(self.targets)):
            sums = self.sums(rows)
            total = _HiddenGradient(self, rows, products[rows])
            exps = [_tile(self._exp, rows.stop - rows.start, tile.stop - tile.start) for tile in self.tiles]
            for tile, exp, shrink in self._computed(rows, sums, exps):
                total.add(tile, exp, shrink)
            results.append(sums.finish())
            total.finish(torch.where(sums.ignored, 0.0, 1.0), results[-1].sums[1])
        return results

    def recomputed(self, rows: slice) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Tiles of E of at most plan.rows rows: tile, E (R, v), exp(m_before − m) (R, 1) and m (R, 1)."""
        sums = self.sums(rows)
        exps = [_tile(self._exp, rows.stop - rows.start, tile.stop - tile.start) for tile in self.tiles]
        for tile, exp, shrink in self._computed(rows, sums, exps):
            yield tile, exp, shrink, sums.maximum

    def remembered(self, kept: Kept, part: slice) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """The same of kept rows `part`, which went through the tiles together."""
        before = kept[1][0, part].unsqueeze(1)
        for number, (tile, exp) in enumerate(zip(self.tiles, self._kept_tiles(kept, part), strict=True)):
            maximum = kept[1][number, part].unsqueeze(1)
            yield tile, exp, (before - maximum).exp_(), maximum
            before = maximum

    def _kept_tiles(self, kept: Kept, part: slice) -> list[Tensor]:
        """Where kept rows `part` have their tiles of E: one after the other, so that each is contiguous."""
        flat, n = kept[0][part].view(-1), part.stop - part.start
        return [flat[n * tile.start : n * tile.stop].view(n, -1) for tile in self.tiles]

    def _computed(
        self, rows: slice, sums: OnlineSums, exps: list[Tensor] | list[None]
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """tile, E in its place of exps (logits where that is None), exp(m_before − m), one tile after the other."""
        hidden = self.hidden[rows].to(self.wide)
        for tile, exp in zip(self.tiles, exps, strict=True):
            if exp is not None and exp.dtype == self.wide:
                logits = exp  # kept rows: in their place at once, which writes them to memory once
            else:
                logits = _tile(self._logits, len(hidden), tile.stop - tile.start)
            torch.mm(hidden, self.wide_weight(tile).t(), out=logits)
            bias = None if self.bias is None else self.bias[tile]
            shrink = sums.add(logits, tile.start, bias, exp)
            yield tile, logits if exp is None else exp, shrink

    def gradients(self, needs: tuple[bool, bool, bool]) -> TileGradients:
        """What adds up the gradients of hidden, weight and bias that are needed."""
        return TileGradients(self, needs)


def _tile(flat: Tensor, rows: int, columns: int) -> Tensor:
    return flat[: rows * columns].view(rows, columns)


class _HiddenGradient:
    """out (R, D) <- dh, tile by tile; added up in float32 or float64 and rounded once.

    E·W of a tile comes in E's dtype: a 16-bit head's is rounded before it is added, which costs no more than E's own
    rounding did.
    """

    def __init__(self, head: TiledHead, rows: slice, out: Tensor) -> None:
        """out is written by finish, and is where the sum grows if it has the sum's dtype."""
        self.head, self.rows, self.out = head, rows, out
        self.total = out.zero_() if out.dtype == head.wide else torch.zeros_like(out, dtype=head.wide)

    def add(self, tile: slice, exp: Tensor, shrink: Tensor) -> None:
        """E (R, v) of a tile, and how it shrinks what the tiles before it gave."""
        self.total.mul_(shrink)
        if exp.dtype == self.head.wide:
            self.total.addmm_(exp, self.head.wide_weight(tile))
        else:
            self.total.add_(torch.mm(exp, self.head.weight[tile]))

    def finish(self, factor: Tensor, at_target: Tensor) -> None:
        """c (R,) relative to the last tile's m, and c·pull (R,); where c is 0 the row may hold anything."""
        self.total.mul_(factor.unsqueeze(1)).masked_fill_((factor == 0).unsqueeze(1), 0.0)
        safe_targets = self.head.targets[self.rows].clamp(0, len(self.head.weight) - 1)
        target_rows = self.head.weight[safe_targets].to(self.head.wide)
        self.total.addcmul_(target_rows, at_target.unsqueeze(1))
        if self.out is not self.total:
            self.out.copy_(self.total)


class TileGradients:
    """Adds up dW and db and writes dh; needs says which of hidden, weight, bias get one.

    dW is added up in float32 (float64) and rounded at the end; one that is written once is rounded there.
    """

    def __init__(self, head: TiledHead, needs: tuple[bool, bool, bool]) -> None:
        """Allocate the gradients that are needed: dW is written by its first product, without zeros before."""
        self.head = head
        need_dh, need_dw, need_db = needs
        once = head.plan.kept_rows == len(head.targets) <= head.plan.rows
        self.dh = torch.empty_like(head.hidden) if need_dh else None
        self.dw: Tensor | None = None
        if need_dw:
            dtype = head.weight.dtype if once else head.wide
            self.dw = _DW.empty(head.weight.shape, like=head.weight, dtype=dtype)
        self._written = False  # dW, by the rows before
        self.db = head.hidden.new_zeros(len(head.weight), dtype=head.wide) if need_db else None

    def add(self, rows: slice, coefficients: Tensor, sums: Tensor, kept: Kept | None) -> None:
        """Add the rows' share: of the first rows of kept, or of rows that are computed again.

        coefficients (R,) is c, and sums (3, R) what OnlineSums.finish left of the rows.
        """
        head = self.head
        for part in chunks(0, rows.stop - rows.start, head.plan.rows):
            here = slice(rows.start + part.start, rows.start + part.stop)
            tiles = head.recomputed(here) if kept is None else head.remembered(kept, part)
            self._add(here, tiles, coefficients[part], *sums[1:, part])
            self._written = True

    def _add(
        self,
        rows: slice,
        tiles: Iterator[tuple[slice, Tensor, Tensor, Tensor]],
        coefficients: Tensor,
        pull: Tensor,
        last_maximum: Tensor,
    ) -> None:
        head, targets = self.head, self.head.targets[rows]
        nothing, at_target = coefficients == 0, coefficients * pull
        dh = None if self.dh is None else _HiddenGradient(head, rows, self.dh[rows])
        factor = coefficients
        if self.dw is not None:
            # filled, not times zero: an ignored row's hidden may be NaN, and so its m
            hidden = head.hidden[rows].to(head.wide).masked_fill(nothing.unsqueeze(1), 0.0)
            scaled = torch.empty_like(hidden)
        for tile, exp, shrink, maximum in tiles:
            factor = (maximum.squeeze(1) - last_maximum).exp_().mul_(coefficients).masked_fill_(nothing, 0.0)
            if dh is not None:
                dh.add(tile, exp, shrink)
            if self.dw is None and self.db is None:
                continue
            exp = head.wide_exp(exp)
            if self.db is not None:
                self.db[tile].addmv_(exp.t(), factor)
            if self.dw is not None:
                torch.mul(hidden, factor.unsqueeze(1), out=scaled)
                own = ((targets >= tile.start) & (targets < tile.stop)).nonzero().squeeze(1)
                pulled = hidden[own].mul_(at_target[own].unsqueeze(1))
                self._add_to_dw(tile, exp, scaled, targets[own] - tile.start, pulled)
        if self.db is not None:
            self.db.index_add_(0, targets.clamp(0, len(self.db) - 1), at_target)
        if dh is not None:
            dh.finish(factor, at_target)

    def _add_to_dw(self, tile: slice, exp: Tensor, scaled: Tensor, own: Tensor, pulled: Tensor) -> None:
        """dW of a tile <- itself, once it is written, + Eᵀ·scaled, and pulled (n, D) at the tile's targets own (n,)."""
        assert self.dw is not None
        dw = self.dw[tile]
        if self._written:
            total = (dw if dw.dtype == scaled.dtype else dw.to(scaled.dtype)).addmm_(exp.t(), scaled)
        else:
            total = torch.mm(exp.t(), scaled, out=dw if dw.dtype == scaled.dtype else None)
        total.index_add_(0, own, pulled)
        if total is not dw:
            dw.copy_(total)

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dh, dW and db in the dtypes of hidden, weight and bias; None where not needed."""
        if self.dw is not None and not self._written:  # a call without rows
            self.dw.zero_()
        dw, db = (None if total is None else total.to(self.head.weight.dtype) for total in (self.dw, self.db))
        return self.dh, dw, db
