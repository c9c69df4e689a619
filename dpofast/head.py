"""One call's head: its buffers inside a byte budget, E rows on demand, and the gradients that come from them.

With E, S of rows.py, an incoming gradient g per target and c = −g·(dz/dx)/S:   dh = c ⊙ (E·W),   dW = Eᵀ·(c ⊙ h),
db = Eᵀ·c. Buffers: a scratch of logits for a few hundred rows, and rows of E that are kept until c is known.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpofast.gemm import accumulate_dtype, add_transposed_product, logits_into, product
from dpofast.rows import LogitOptions, RowResult, row_blocks, row_logprobs

_ROW_MULTIPLE = 128
SCRATCH_ROWS = 512


def default_logits_bytes(device: torch.device) -> int:
    """1 GiB on an accelerator, 256 MiB on the CPU."""
    return 256 << 20 if device.type == "cpu" else 1 << 30


def exp_dtype(dtype: torch.dtype) -> torch.dtype:
    """E's dtype: the model's own, but float32 for float16, whose range neither e_y − S nor 1/S fits."""
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
    """How many rows of E are kept at a time, and how many rows of logits are scratch."""

    kept_rows: int
    scratch_rows: int

    @staticmethod
    def make(
        rows: int, vocab: int, dtype: torch.dtype, max_logits_bytes: int, *, keep: bool, largest: int | None = None
    ) -> HeadPlan:
        """Split the byte budget; ValueError where it does not hold a single row.

        rows are those of the call, `largest` the most that must be kept at the same time (all of them, if None).

        Where all rows fit and E has the logits' dtype there is no scratch: logits go straight into the kept rows.
        """
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
            return HeadPlan(0, even_rows(rows, min(affordable, SCRATCH_ROWS)))
        if tile_bytes == 0 and (rows if largest is None else largest) <= affordable:
            return HeadPlan(min(rows, affordable), 0)
        scratch = even_rows(rows, min(SCRATCH_ROWS, max(1, affordable // 2)))
        kept = (max_logits_bytes - scratch * row_bytes) // (tile_bytes or logit_bytes)
        return HeadPlan(min(rows, kept), scratch)


class Head:
    """hidden (N, D), weight (V, D), bias (V,) or None and targets (N,) of one call, and E on any slice of its rows."""

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
        """Allocate the scratch; kept rows are the caller's."""
        self.hidden, self.weight, self.bias, self.targets = hidden, weight, bias, targets
        self.options, self.backend, self.plan = options, backend, plan
        self.wide, self.narrow = accumulate_dtype(hidden.dtype), exp_dtype(hidden.dtype)
        self._logits = self._buffer(plan.scratch_rows, self.wide)
        self._tile = self._logits if self.narrow == self.wide else self._buffer(plan.scratch_rows, self.narrow)

    def _buffer(self, rows: int, dtype: torch.dtype) -> Tensor:
        return self.hidden.new_empty(rows, self.weight.shape[0], dtype=dtype)

    def kept(self) -> Tensor:
        """A fresh buffer for the plan's kept rows of E."""
        return self._buffer(self.plan.kept_rows, self.narrow)

    def logps(self, rows: slice) -> RowResult:
        """Log-probs of at most scratch_rows rows, without E."""
        return self._row_work(rows, self._logits[: rows.stop - rows.start], None)

    def exp(self, rows: slice) -> tuple[Tensor, RowResult]:
        """E of at most scratch_rows rows, in the scratch: valid until the next call."""
        n = rows.stop - rows.start
        return self._tile[:n], self._row_work(rows, self._logits[:n], self._tile[:n])

    def exp_into(self, kept: Tensor, rows: slice) -> list[RowResult]:
        """E of any number of rows, written to kept (n, V), a chunk at a time."""
        direct = self.narrow == self.wide
        results = []
        for part in chunks(0, len(kept), self.plan.scratch_rows or even_rows(len(kept), SCRATCH_ROWS)):
            exp = kept[part]
            logits = exp if direct else self._logits[: len(exp)]
            results.append(self._row_work(slice(rows.start + part.start, rows.start + part.stop), logits, exp))
        return results

    def _row_work(self, rows: slice, logits: Tensor, exp: Tensor | None) -> RowResult:
        logits_into(logits, self.hidden[rows], self.weight)
        return row_logprobs(logits, self.bias, self.targets[rows], self.options, exp_out=exp, backend=self.backend)

    def hidden_product(self, exp: Tensor) -> Tensor:
        """E·W (R, D), in E's dtype."""
        return product(exp, self.weight)

    def joined(self, results: list[RowResult], field: str) -> Tensor:
        """One field of all results, in row order."""
        parts = [getattr(result, field) for result in results]
        return torch.cat(parts) if parts else self.hidden.new_empty(0, dtype=self.wide)


class Gradients:
    """Adds up dW and db over flushes of E rows and writes dh; needs says which of hidden, weight, bias get one.

    dW is added up in float32 (float64) and cast at the end; one that is written by a single flush needs no such sum.
    """

    def __init__(self, head: Head, needs: tuple[bool, bool, bool], *, flushes: int = 2) -> None:
        """Allocate the gradients that are needed."""
        self.head = head
        total = head.weight.dtype if flushes <= 1 and head.narrow == head.weight.dtype else head.wide
        need_dh, need_dw, need_db = needs
        self.dh = torch.empty_like(head.hidden) if need_dh else None
        self.dw = torch.empty_like(head.weight, dtype=total) if need_dw else None
        self.db = head.hidden.new_zeros(head.weight.shape[0], dtype=head.wide) if need_db else None
        self._flushed = False

    def flush(self, rows: slice, exp: Tensor, coefficients: Tensor) -> None:
        """Add the rows' share: exp (R, V) is their E, coefficients (R,) is c."""
        c = coefficients.unsqueeze(1)
        if self.dh is not None:
            torch.mul(self.head.hidden_product(exp), c, out=self.dh[rows])
        if self.dw is not None:
            # filled, not times zero: an ignored row's hidden may be NaN
            scaled = exp.new_empty(len(exp), self.head.hidden.shape[1])
            torch.mul(self.head.hidden[rows], c, out=scaled).masked_fill_(c == 0, 0.0)
            add_transposed_product(self.dw, exp, scaled, first=not self._flushed)
        if self.db is not None:
            for block in row_blocks(len(exp)):
                self.db.addmv_(exp[block].to(c.dtype).t(), coefficients[block])
        self._flushed = True

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dh, dW and db in the dtypes of hidden, weight and bias; None where not needed."""
        if self.dw is not None and not self._flushed:
            self.dw.zero_()
        dw = None if self.dw is None else self.dw.to(self.head.weight.dtype)
        db = None if self.db is None else self.db.to(self.head.weight.dtype)
        return self.dh, dw, db


def autocast_inputs(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The head's float inputs in autocast's dtype where it is on: cast here, once, and never inside."""
    if not torch.is_autocast_enabled(hidden.device.type):
        return hidden, weight, bias
    compute = torch.get_autocast_dtype(hidden.device.type)
    return hidden.to(compute), weight.to(compute), None if bias is None else bias.to(compute)


def check_floating(name: str, tensor: Tensor) -> None:
    """ValueError unless the tensor is floating-point."""
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> None:
    """TypeError for a head that is no plain dense tensor, ValueError for shapes, dtypes or devices that do not fit."""
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (type(tensor.data) is not Tensor or tensor.layout != torch.strided):
            raise TypeError(
                f"{name}: expected a plain dense tensor, got {type(tensor.data).__name__} ({tensor.layout}): "
                "gather or dequantize the head first"
            )
    check_floating("hidden", hidden)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden (N, D) and weight (V, D): expected equal D, got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    check_targets(targets, hidden.device)
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets: expected shape ({hidden.shape[0]},), got {tuple(targets.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype != hidden.dtype or tensor.device != hidden.device):
            raise ValueError(
                f"{name}: expected hidden's dtype and device, {hidden.dtype} on {hidden.device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )


def check_targets(targets: Tensor, device: torch.device) -> None:
    """ValueError unless targets are int64 on the device; their values are looked at by check_target_values."""
    if targets.dtype != torch.int64:
        raise ValueError(f"targets: expected int64, got {targets.dtype}")
    if targets.device != device:
        raise ValueError(f"targets: expected on {device}, got {targets.device}")
