"""One call's head: its buffers inside a byte budget, E rows on demand, and the gradients that come from them.

With E, S of rows.py, an incoming gradient g per target and c = −g·(dz/dx)/S:   dh = c ⊙ (E·W),   dW = Eᵀ·(c ⊙ h),
db = Eᵀ·c. Buffers: a scratch of logits for a few hundred rows, and rows of E that are kept until c is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dpofast.head.engine.matmul import accumulate_dtype, add_transposed_product, logits_into, product_into
from dpofast.head.engine.rows import TEMPORARY_ROWS, RowResult, kernel_rows, row_blocks
from dpofast.head.options import LogitOptions

# Room for logits and what is computed from them, where a call does not say. On a CPU, half of it makes a head that
# trains per token a tenth slower (N = 2,048, V = 151,936: fewer rows of E are kept), one whose pairs are known 1 %.
DEFAULT_LOGITS_BYTES = 1 << 30
# What is kept of rows until their coefficients are known: E, and for vocab_tiles.py the maxima that it is relative to.
Kept = tuple[Tensor, Tensor]

_ROW_MULTIPLE = 128
# A product packs the whole head first, whatever its rows: on a CPU that costs a tenth at 512 rows, so more are taken.
SCRATCH_ROWS, _CPU_SCRATCH_ROWS = 512, 2048
# Rows of the (V, D) factor that are upcast together where they have to be, and where memory allows.
_UPCAST_ROWS = 1024
# Rows of a buffer on a GPU start 16 elements apart, or a multiple: a kernel reads them 16 bytes at a time at any V.
_COLUMN_MULTIPLE = 16


def exp_dtype(dtype: torch.dtype) -> torch.dtype:
    """E's dtype: the model's own, but float32 for float16.

    float16 would hold E, whose entries reach V − 1, behind a power of two that V alone fixes. It would not hold what
    dW needs beside it: c ⊙ h with |c| = |g|/S. On flat rows of V = 262,144 and g = 1e-3, a loss over 64 pairs, those
    products are of the size of float16's least number: dW is off by 57 %, at g = 1e-4 by 100 % (measured;
    tests/head/test_accuracy.py). A scale for them follows from g, which only the device knows, so it would cost a sync,
    or a pass over dW for every flush.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def even_rows(rows: int, most: int) -> int:
    """The chunk size that splits `rows` evenly into chunks of at most `most`, a multiple of 128 where that fits."""
    if rows <= most:
        return max(rows, 1)
    even = -(-rows // -(-rows // most))
    rounded = -(-even // _ROW_MULTIPLE) * _ROW_MULTIPLE
    return rounded if rounded <= most else even


def chunks(start: int, stop: int, rows: int) -> list[slice]:
    """[start, stop) in slices of `rows`."""
    return [slice(at, min(at + rows, stop)) for at in range(start, stop, max(rows, 1))]


@dataclass(frozen=True)
class HeadPlan:
    """How many rows of everything fit max_logits_bytes.

    kept_rows of E are kept at a time, scratch_rows of logits are scratch; upcast_rows of the weight and temporary_rows
    of the vocabulary are copied at once where a product or the row work needs copies; step rows go through the scratch,
    or straight into the kept rows, at a time.
    """

    kept_rows: int
    scratch_rows: int
    upcast_rows: int
    temporary_rows: int
    step: int

    @staticmethod
    def make(
        rows: int,
        weight: Tensor,
        max_logits_bytes: int,
        *,
        keep: bool,
        largest: int | None = None,
        temporaries: int = 0,
        vocab: int | None = None,
    ) -> HeadPlan:
        """Split the byte budget; ValueError where it does not hold a single row.

        Counted are the logits, E, and what the products and the row work allocate beside them: nothing of the head is
        alive beyond the budget but inputs, returned gradients, E·W (N, D) of a frozen head, the float32 dW of a 16-bit
        head that is flushed more than once, and vectors of N elements.

        Args:
            rows: those of the call.
            weight: (V, D); its shape, dtype and device count.
            max_logits_bytes: the budget.
            keep: the head trains, so rows of E are kept for it.
            largest: the most rows that must be kept at the same time, None for all.
            temporaries: blocks of temporary_rows that the row work needs at the same time.
            vocab: V where it is not the weight's (a larger shard of another rank).
        """
        dtype, width, most = weight.dtype, weight.shape[1], max_logits_bytes
        at_once = _CPU_SCRATCH_ROWS if weight.device.type == "cpu" else SCRATCH_ROWS
        wide, narrow = accumulate_dtype(dtype).itemsize, exp_dtype(dtype).itemsize
        columns = _columns(weight.shape[0] if vocab is None else vocab, weight.device)
        # CUDA's products widen their result themselves; E in float32 beside a float16 weight needs a copy there too.
        upcasts = dtype.itemsize < wide and not (weight.is_cuda and narrow < wide)
        upcast = min(_UPCAST_ROWS, columns, max(1, most // (32 * wide * max(width, _UPCAST_ROWS)))) if upcasts else 0
        # db adds E up in float32, from a copy of a few rows.
        temporaries = max(temporaries, int(keep and narrow < wide))
        temporary = min(TEMPORARY_ROWS, max(1, most // (32 * wide * columns * max(temporaries, 1))))
        # Two copies of the weight's or dW's block, and E's; then temporaries, and db before it is rounded.
        fixed = upcast * (2 * width + upcast) * wide + (temporary * temporaries + keep) * columns * wide
        # Beside logits and E, (rows, D) copies: the product before it is rounded, and c ⊙ h, which a flush needs.
        copied = width * wide if dtype.itemsize < wide else 0
        flushed = width * narrow if keep else 0
        kept_bytes = columns * narrow + flushed
        scratch_bytes = columns * (wide + (narrow if narrow < wide else 0)) + copied + flushed
        if most < fixed + scratch_bytes:
            raise too_few_bytes(columns, fixed + scratch_bytes, most)
        affordable = (most - fixed) // scratch_bytes
        if not keep:
            scratch = even_rows(rows, min(affordable, at_once))
            return HeadPlan(0, scratch, upcast, temporary, scratch)
        # Logits become E where they are, so where all rows fit there is no scratch.
        needed = rows if largest is None else largest
        if narrow == wide and needed * kept_bytes + min(needed, at_once) * copied <= most - fixed:
            room = (most - fixed - at_once * copied) // kept_bytes
            kept = min(rows, max(needed, room))
            return HeadPlan(kept, 0, upcast, temporary, even_rows(kept, at_once))
        scratch = even_rows(rows, min(SCRATCH_ROWS, max(1, affordable // 2)))
        kept = (most - fixed - scratch * scratch_bytes) // kept_bytes
        return HeadPlan(min(rows, kept), scratch, upcast, temporary, scratch)


def too_few_bytes(columns: int, least: int, most: int) -> ValueError:
    """The error of a byte budget that holds no row."""
    return ValueError(
        f"max_logits_bytes: expected at least one row of {columns} logits and what goes with it, {least} bytes, "
        f"got {most}: raise it"
    )


def _columns(vocab: int, device: torch.device) -> int:
    """Columns between the starts of two rows of a buffer.

    None are added on the CPU: oneDNN's bfloat16 products (AMX, torch 2.13) read a few columns past the row's end and
    multiply them by 0, so that a NaN in memory never written comes out as NaN.
    """
    return vocab if device.type == "cpu" else -(-vocab // _COLUMN_MULTIPLE) * _COLUMN_MULTIPLE


def exp_rows_like(weight: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """An uninitialized (rows, V) buffer on the weight's device, its rows as far apart as HeadPlan counts."""
    vocab = weight.shape[0]
    return weight.new_empty(rows, _columns(vocab, weight.device), dtype=dtype)[:, :vocab]


def scale_rows(out: Tensor, rows: Tensor, coefficients: Tensor, step: int = SCRATCH_ROWS) -> None:
    """out (R, D) <- coefficients (R,) ⊙ rows (R, D), possibly in place: step rows at a time, for torch's own copies."""
    for part in chunks(0, len(rows), step):
        torch.mul(rows[part], coefficients[part].unsqueeze(1), out=out[part])


class Head:
    """hidden (N, D), weight (V, D), bias (V,) or None and targets (N,) of one call, and E on any slice of its rows."""

    # How many RowResult.sums a row has.
    SUMS = 1

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: LogitOptions,
        backend: str,
        plan: HeadPlan,
    ) -> None:
        """Nothing is allocated yet: the scratch is at its first use, kept rows are the caller's."""
        self.hidden, self.weight, self.bias, self.targets = hidden, weight, bias, targets
        self.options, self.backend, self.plan = options, backend, plan
        self.wide, self.narrow = accumulate_dtype(hidden.dtype), exp_dtype(hidden.dtype)

    @cached_property
    def _logits(self) -> Tensor:
        return exp_rows_like(self.weight, self.plan.scratch_rows, self.wide)

    @cached_property
    def _tile(self) -> Tensor:
        if self.narrow == self.wide:
            return self._logits
        return exp_rows_like(self.weight, self.plan.scratch_rows, self.narrow)

    def kept(self) -> Kept:
        """A fresh buffer for the plan's kept rows of E."""
        return exp_rows_like(self.weight, self.plan.kept_rows, self.narrow), self.weight.new_empty(0)

    def beyond(self, start: int, stop: int) -> list[slice]:
        """Rows [start, stop) that are not kept, in slices that fit the scratch."""
        return chunks(start, stop, self.plan.scratch_rows)

    def logps(self, rows: slice) -> RowResult:
        """Log-probs of at most scratch_rows rows, without E."""
        return self._row_work(rows, self._logits[: rows.stop - rows.start], None)

    def all_logps(self) -> list[RowResult]:
        """Log-probs of all rows, for a call that needs no gradient: the backend 'fused' keeps logits off memory.

        Statistics need the logits, so with them 'fused' works as 'triton' does.
        """
        if self.backend != "fused" or self.options.stats:
            return [self.logps(rows) for rows in self.beyond(0, len(self.targets))]
        from dpofast.kernels.linear_logprobs import linear_logprobs

        logps, _ = linear_logprobs(
            self.hidden, self.weight, self.targets, bias=self.bias, **self.options.kernel_arguments()
        )
        return [RowResult(logps, torch.zeros_like(logps).unsqueeze(0), {})]

    def exp(self, rows: slice) -> tuple[Tensor, RowResult]:
        """E of at most scratch_rows rows, in the scratch: valid until the next call."""
        n = rows.stop - rows.start
        return self._tile[:n], self._row_work(rows, self._logits[:n], self._tile[:n])

    def keep(self, kept: Kept, rows: slice) -> list[RowResult]:
        """E of any number of rows into the first rows of kept, a chunk at a time."""
        results = []
        for part in chunks(0, rows.stop - rows.start, self.plan.step):
            exp = kept[0][part]
            logits = exp if self.narrow == self.wide else self._logits[: len(exp)]
            results.append(self._row_work(slice(rows.start + part.start, rows.start + part.stop), logits, exp))
        return results

    def frozen(self, products: Tensor) -> list[RowResult]:
        """products (N, D) <- E·W, so that dh = c ⊙ products."""
        results = []
        for rows in self.beyond(0, len(self.targets)):
            exp, result = self.exp(rows)
            self.hidden_product(products[rows], exp)
            results.append(result)
        return results

    def gradients(self, needs: tuple[bool, bool, bool]) -> Gradients:
        """What adds up the gradients of hidden, weight and bias that are needed."""
        return Gradients(self, needs, flushes=1 if self.plan.kept_rows == len(self.targets) else 2)

    def _row_work(self, rows: slice, logits: Tensor, exp: Tensor | None) -> RowResult:
        logits_into(logits, self.hidden[rows], self.weight, self.plan.upcast_rows)
        return kernel_rows(logits, self.bias, self.targets[rows], self.options, exp_out=exp)

    def hidden_product(self, out: Tensor, exp: Tensor, coefficients: Tensor | None = None) -> None:
        """out (R, D) <- E·W, with coefficients (R,) c ⊙ (E·W)."""
        for part in chunks(0, len(exp), self.plan.step):
            c = None if coefficients is None else coefficients[part]
            product_into(out[part], exp[part], self.weight, self.plan.upcast_rows, c)


class Gradients:
    """Adds up dW and db over flushes of E rows and writes dh; needs says which of hidden, weight, bias get one.

    dW is added up in float32 (float64) and rounded at the end; one that a single flush writes is rounded there.
    """

    def __init__(self, head: Head, needs: tuple[bool, bool, bool], *, flushes: int = 2) -> None:
        """Allocate the gradients that are needed."""
        self.head = head
        need_dh, need_dw, need_db = needs
        self.dh = torch.empty_like(head.hidden) if need_dh else None
        total = head.weight.dtype if flushes <= 1 else head.wide
        self.dw = torch.empty_like(head.weight, dtype=total) if need_dw else None
        self.db = head.hidden.new_zeros(head.weight.shape[0], dtype=head.wide) if need_db else None
        self._flushed = False

    def add(self, rows: slice, coefficients: Tensor, sums: Tensor, kept: Kept | None) -> None:
        """Add the rows' share: of the first rows of kept, or of at most scratch_rows rows that are computed again."""
        exp = self.head.exp(rows)[0] if kept is None else kept[0][: rows.stop - rows.start]
        self.flush(rows, exp, coefficients)

    def flush(self, rows: slice, exp: Tensor, coefficients: Tensor) -> None:
        """Add the rows' share: exp (R, V) is their E, coefficients (R,) is c."""
        head, plan = self.head, self.head.plan
        if self.dh is not None:
            head.hidden_product(self.dh[rows], exp, coefficients)
        if self.dw is not None:
            scaled = exp.new_empty(len(exp), head.hidden.shape[1])
            scale_rows(scaled, head.hidden[rows], coefficients, plan.step)
            # filled, not times zero: an ignored row's hidden may be NaN
            scaled.masked_fill_(coefficients.unsqueeze(1) == 0, 0.0)
            add_transposed_product(self.dw, exp, scaled, plan.upcast_rows, first=not self._flushed)
        if self.db is not None:
            for block in row_blocks(len(exp), plan.temporary_rows):
                self.db.addmv_(exp[block].to(self.db.dtype).t(), coefficients[block])
        self._flushed = True

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dh, dW and db in the dtypes of hidden, weight and bias; None where not needed."""
        if self.dw is not None and not self._flushed:
            self.dw.zero_()
        dw = None if self.dw is None else self.dw.to(self.head.weight.dtype)
        db = None if self.db is None else self.db.to(self.head.weight.dtype)
        return self.dh, dw, db
