"""Log-probs and statistics of rows that never exist whole: tiles of the vocabulary, one after the other.

The online softmax (Milakov and Gimelshein, arXiv 1805.02867). With y the target and m = max z of the tiles so far, a
tile z becomes exp(z − m) in place, 0 at the target, and adds to

    others = Σ_{v≠y} exp(z_v − m)      S = others + exp(z_y − m)      logp = z_y − m − log S

A tile that raises m rescales every sum before it by exp(m_before − m), and so must its user whatever was accumulated
from the earlier tiles. Without the target in the tile, (p − onehot)·S at y is −others: known at the end, without
cancellation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpofast.head.engine.interface import HeadInputs, RowResult, RowSums
from dpofast.head.engine.rows import scale_in_place
from dpofast.head.planning.plan import chunks

# The shift from which exp is 0 in float32 and float64: beyond it, z − m times exp(z − m) is 0 and not 0·inf.
_FAR = -1e4


def rescale_factor(before: Tensor, after: Tensor) -> Tensor:
    """exp(before − after): turns a sum of exp(z − before) into the sum of exp(z − after)."""
    return (before - after).exp_()


class OnlineSoftmax:
    """The sums of R rows; block_rows are worked on together, so that all passes but the first read from cache.

    Attributes:
        ignored: (R,) bool.
        maximum: m, (R, 1), of the tiles so far.
    """

    def __init__(self, inputs: HeadInputs, rows: slice, block_rows: int) -> None:
        """Start without a tile; targets are ids of the whole vocabulary."""
        targets, options, vocab, dtype = inputs.targets[rows], inputs.options, len(inputs.weight), inputs.wide
        self.targets, self.vocab, self.options, self.block_rows = targets.unsqueeze(1), vocab, options, block_rows
        self.ignored = inputs.ignored(rows)
        self.any_ignored = not targets.is_cpu or bool(self.ignored.any())

        def column(value: float) -> Tensor:
            return targets.new_full((len(targets), 1), value, dtype=dtype)

        # From the lowest finite number up, so that tiles of nothing but −inf, as padding of a vocabulary, add 0.
        self.maximum, self.others = column(torch.finfo(dtype).min), column(0.0)
        self.target = column(torch.nan)  # z_y, and what a target outside the vocabulary leaves
        self._sums = {name: column(0.0) for name in options.stats if name != "is_top1"}
        if "is_top1" in options.stats:
            self._largest, self._is_top1 = column(-torch.inf), torch.zeros_like(self.targets, dtype=torch.bool)

    def add(self, x: Tensor, start: int, bias: Tensor | None, exp_out: Tensor | None = None) -> Tensor:
        """Add a tile, raw logits x (R, v) of ids from `start` on, overwritten; returns exp(m_before − m) (R, 1).

        exp_out (R, v), of any float dtype and possibly x itself, receives E without its entry at the target: exp(z − m)
        with softcap's factor 1 − tanh², zeros where ignored.
        """
        before, added = self.maximum.clone(), torch.empty_like(self.others)
        sums = {name: torch.empty_like(total) for name, total in self._sums.items()}
        for rows in chunks(0, len(x), self.block_rows):
            z = x[rows]
            if bias is not None:
                z.add_(bias)
            tanh_squared = scale_in_place(z, self.options, keep_derivative=exp_out is not None)
            local = self.targets[rows] - start
            inside = (local >= 0) & (local < z.shape[1])
            local.clamp_(0, z.shape[1] - 1)
            self.target[rows] = torch.where(inside, z.gather(1, local), self.target[rows])
            row_max = self.maximum[rows]
            found = z.amax(dim=1, keepdim=True)
            torch.maximum(row_max, found, out=row_max)
            if "mean_logits" in sums:
                torch.sum(z, dim=1, keepdim=True, out=sums["mean_logits"][rows])
            if "is_top1" in self.options.stats:
                at_target = inside & (z.argmax(dim=1, keepdim=True) == local)
                self._find_largest(rows, found, at_target, first=start == 0)
            z.sub_(row_max)
            shifted = z.clamp(min=_FAR) if "entropy" in sums else None
            z.exp_()
            z.scatter_(1, local, z.gather(1, local).masked_fill_(inside, 0.0))
            torch.sum(z, dim=1, keepdim=True, out=added[rows])
            if shifted is not None:
                torch.sum(shifted.mul_(z), dim=1, keepdim=True, out=sums["entropy"][rows])
                del shifted
            if "log_sum_sq_probs" in sums:
                torch.sum(z.square(), dim=1, keepdim=True, out=sums["log_sum_sq_probs"][rows])
            if exp_out is not None:
                if tanh_squared is not None:
                    z.addcmul_(z, tanh_squared, value=-1.0)
                if self.any_ignored:
                    z.masked_fill_(self.ignored[rows].unsqueeze(1), 0.0)
                if exp_out.data_ptr() != x.data_ptr():
                    exp_out[rows].copy_(z)
        return self._accumulate(before, added, sums)

    def _find_largest(self, rows: slice, found: Tensor, at_target: Tensor, *, first: bool) -> None:
        """Among equal maxima the first counts, and a NaN before all others, as for argmax."""
        largest = self._largest[rows]
        moved = (found > largest) | (found.isnan() & ~largest.isnan()) | first
        self._is_top1[rows] = torch.where(moved, at_target, self._is_top1[rows])
        torch.maximum(largest, found, out=largest)

    def _accumulate(self, before: Tensor, added: Tensor, sums: dict[str, Tensor]) -> Tensor:
        """Rescale every sum so far to the new maximum, and add the tile's."""
        rescale = rescale_factor(before, self.maximum)
        for name, total in self._sums.items():
            if name == "entropy":  # Σ e·(z − m) is to another m too
                total.addcmul_(before.sub_(self.maximum).clamp_(min=_FAR), self.others)
            if name != "mean_logits":
                total.mul_(rescale)
            if name == "log_sum_sq_probs":
                total.mul_(rescale)
            total.add_(sums[name])
        self.others.mul_(rescale).add_(added)
        return rescale

    def finish(self) -> RowResult:
        """The rows' results, after the last tile."""
        own = (self.target - self.maximum).exp_()
        sum_exp = self.others + own
        log_sum = sum_exp.log()
        stats = {}
        for name in self.options.stats:
            if name == "is_top1":
                value = self._is_top1
            elif name == "mean_logits":
                value = self._sums[name] / self.vocab
            elif name == "entropy":
                shifted = (self.target - self.maximum).clamp_(min=_FAR)
                value = log_sum - (self._sums[name] + own * shifted) / sum_exp
            else:
                value = (self._sums[name] + own.square()).log() - 2 * log_sum
            stats[name] = value.squeeze(1).masked_fill_(self.ignored, 0)
        target_exp = -self.others
        if self.options.softcap is not None:
            target_exp.mul_(1 - (self.target * (self.options.temperature / self.options.softcap)).square_())
        columns = (-self.options.gradient_scale / sum_exp, target_exp, self.maximum)
        rescale, target_exp, row_max = (column.squeeze(1).masked_fill(self.ignored, 0.0) for column in columns)
        logps = (self.target - self.maximum - log_sum).squeeze(1).masked_fill_(self.ignored, 0.0)
        return RowResult(logps, RowSums(rescale, target_exp, row_max, logps.new_empty(0)), stats)
