"""Chunk and tile sizes of an LM-head call, chosen so that all buffers it allocates fit in max_logits_bytes.

HeadPlan divides a call into chunks of whole rows of logits, for the Triton backends and for a head that is sharded over
ranks; TilePlan divides it into tiles of the vocabulary, for the torch backend. Both sum the sizes of the same named
buffers (Buffer) that the error message prints if the budget is too small.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dpofast.head.options import LogitOptions
from dpofast.head.planning.device import HeadDevice, head_device
from dpofast.head.planning.dtypes import accumulate_dtype, scaleless_exp_dtype

# Default of max_logits_bytes, for logits and what is computed from them. On a CPU, half of it makes linear_logprobs
# with a trained head 10 % slower (N = 2,048, V = 151,936: fewer rows of E are kept), linear_preference_loss 1 %.
DEFAULT_LOGITS_BYTES = 1 << 30
# The same on a GPU with at least this much memory, so that a 16-bit dW is written once as often as possible.
_LARGE_LOGITS_BYTES, _LARGE_MEMORY = 4 << 30, 39 * 10**9

# Rows whose temporaries (softcap's derivative, a statistic's product) exist at the same time, where memory allows.
TEMPORARY_ROWS = 32
# Bytes of rows processed together that fit into a CPU's second-level caches.
CACHE_BYTES = 4 << 20
_ROW_MULTIPLE = 128
# Rows of a buffer on a GPU start 16 elements apart, or a multiple: a kernel reads them 16 bytes at a time at any V.
_COLUMN_MULTIPLE = 16

# HeadPlan. A product packs the whole head first, whatever its rows: on a CPU that costs a tenth at 512 rows, so more
# are taken.
SCRATCH_ROWS, _CPU_SCRATCH_ROWS = 512, 2048
# A GPU's product is made of tiles of so many results, one a multiprocessor at a time: of this many rounds the last one,
# on average half empty, costs 1 %. Below this width D a round is so short that the start of the product counts too.
_GEMM_TILE, _ROUNDS, _WIDE = 128 * 256, 48, 1024
# To read and write a float32 dW takes a GPU as long as to compute the logits of about this many rows again: 8·V·D bytes
# at 2.7 TB/s, 2·V·D operations a row at 800 TFLOP/s.
_DW_ROWS = 1200
# Rows of the (V, D) factor that are upcast together where they have to be, and where memory allows.
_UPCAST_ROWS = 1024

# TilePlan, measured (2 cores, D = 1,024): products are fastest from 2,048 rows on; tiles of 4,096 columns gain up to
# 7 % over 8,192, and 2 % over 2,048.
TILE_ROWS, TILE_COLUMNS = 2048, 4096
# Rows of E that are kept at a time where no more are needed at once: further rows gain less than their memory is worth.
KEPT_ROWS = 1024


class Buffer(NamedTuple):
    """A matrix that a call allocates beside its inputs and results."""

    name: str
    rows: int
    columns: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return self.rows * self.columns * self.dtype.itemsize

    def __str__(self) -> str:
        """Format the buffer for the error message of a budget that is too small."""
        return f"{self.name} ({self.rows}, {self.columns}) {str(self.dtype).removeprefix('torch.')}"


def total_bytes(buffers: Iterable[Buffer]) -> int:
    """The bytes of all buffers together."""
    return sum(buffer.bytes for buffer in buffers)


def even_rows(rows: int, most: int) -> int:
    """The chunk size that splits `rows` evenly into chunks of at most `most`, a multiple of 128 where that fits."""
    if rows <= most:
        return max(rows, 1)
    even = -(-rows // -(-rows // most))
    rounded = -(-even // _ROW_MULTIPLE) * _ROW_MULTIPLE
    return rounded if rounded <= most else even


def even_chunks(start: int, stop: int, most: int) -> list[slice]:
    """Divide [start, stop) into the fewest slices of at most `most` rows: equal ones, up to 128 rows."""
    rows, most = stop - start, max(most, 1)
    count = -(-rows // most)
    step = _ROW_MULTIPLE if most % _ROW_MULTIPLE == 0 else 1
    steps = -(-rows // step)
    bounds = [min(start + steps * number // count * step, stop) for number in range(count + 1)] if count else []
    return [slice(at, end) for at, end in itertools.pairwise(bounds)]


def default_logits_bytes(device: torch.device) -> int:
    """max_logits_bytes where none is given: 1 GiB, on a GPU of 40 GB or more 4 GiB."""
    return _LARGE_LOGITS_BYTES if head_device(device).memory_bytes >= _LARGE_MEMORY else DEFAULT_LOGITS_BYTES


def chunks(start: int, stop: int, size: int) -> list[slice]:
    """Divide [start, stop) into slices of `size` rows; the last one may be shorter."""
    return [slice(at, min(at + size, stop)) for at in range(start, stop, max(size, 1))]


def buffer_columns(vocab: int, device: torch.device) -> int:
    """Columns between the starts of two rows of a (rows, V) buffer.

    On the CPU rows are not padded: oneDNN's bfloat16 products (AMX, torch 2.13) read a few columns past the row's end
    and multiply them by 0, so a NaN in uninitialized padding would give NaN.
    """
    return vocab if device.type == "cpu" else -(-vocab // _COLUMN_MULTIPLE) * _COLUMN_MULTIPLE


def _too_few_bytes(columns: int, least: int, most: int, buffers: Iterable[Buffer]) -> ValueError:
    """Return the error for a byte budget too small for one row."""
    return ValueError(
        f"max_logits_bytes: expected at least one row of {columns} logits and what goes with it, {least} bytes, "
        f"got {most}: raise it. For one row: {', '.join(str(buffer) for buffer in buffers if buffer.bytes)}"
    )


@dataclass(frozen=True)
class _Buffers:
    """The buffers of a head whose weight (V, D) has `dtype`; vocab: V, or the columns that a row of logits takes.

    narrow: the dtype of E.
    """

    vocab: int
    width: int
    dtype: torch.dtype
    narrow: torch.dtype
    keep: bool

    @property
    def wide(self) -> torch.dtype:
        """The dtype of logits and sums."""
        return accumulate_dtype(self.dtype)

    def logits(self, rows: int, columns: int) -> list[Buffer]:
        """Logits, and E where it is narrower: elsewhere it overwrites them."""
        buffers = [Buffer("logits", rows, columns, self.wide)]
        if self.narrow.itemsize < self.wide.itemsize:
            buffers.append(Buffer("E", rows, columns, self.narrow))
        return buffers

    def bias_gradient(self) -> list[Buffer]:
        """db, which is accumulated over all rows."""
        return [Buffer("db before it is rounded", 1, self.vocab, self.wide)] if self.keep else []


@dataclass(frozen=True)
class _HeadBuffers(_Buffers):
    """What HeadPlan counts. fused: logits are in no buffer."""

    fused: bool = False

    def fixed(self, upcast: int, temporary_rows: int) -> list[Buffer]:
        """What does not grow with the rows: copies in float32 of `upcast` rows of the weight, temporaries, db."""
        return [
            Buffer("block of the weight and of dW in float32", 2 * upcast, self.width, self.wide),
            Buffer("block of E in float32", upcast, upcast, self.wide),
            Buffer("temporaries of the row work", temporary_rows, self.vocab, self.wide),
            *self.bias_gradient(),
        ]

    @property
    def is_apart(self) -> bool:
        """Whether E has a buffer of its own, narrower than the logits that it is made of; else it overwrites them."""
        return self.narrow.itemsize < self.wide.itemsize

    def logits(self, rows: int) -> list[Buffer]:  # type: ignore[override]
        """Rows of logits where they are not E's buffer."""
        return [Buffer("logits", rows, self.vocab, self.wide)] if self.is_apart and not self.fused else []

    def exp(self, name: str, rows: int) -> list[Buffer]:
        """Rows of E, and what their products need: both take all these rows at once."""
        buffers = [Buffer(name, rows, self.vocab, self.narrow)]
        if self.dtype.itemsize < self.wide.itemsize:
            buffers.append(Buffer("product before it is rounded", rows, self.width, self.wide))
        return buffers + ([Buffer("c ⊙ h", rows, self.width, self.narrow)] if self.keep else [])


@dataclass(frozen=True)
class HeadPlan:
    """How many rows of everything fit in max_logits_bytes where E is computed in whole rows.

    Attributes:
        kept_rows: rows of E that are kept at a time until their coefficients are known.
        scratch_rows: rows of E that are scratch: of a frozen head, or computed again. Their products take all at once.
        upcast_rows: rows of the weight that are copied in float32 at once, where a product needs that.
        temporary_rows: rows of the vocabulary that the row work copies at once.
        chunk_rows: rows of logits that exist at a time.
        buffers: what the plan allocates; at most max_logits_bytes together.
    """

    kept_rows: int
    scratch_rows: int
    upcast_rows: int
    temporary_rows: int
    chunk_rows: int
    buffers: tuple[Buffer, ...] = ()

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
        device: HeadDevice | None = None,
        narrow: torch.dtype | None = None,
        fused: bool = False,
    ) -> HeadPlan:
        """Split the byte budget.

        Counted are the logits, E, and what the products and the row work allocate beside them: nothing of the head is
        alive beyond the budget but inputs, returned gradients, E·W (N, D) of a frozen head, vectors of N elements, and
        for a 16-bit head that trains 4·V·D bytes: a float32 dW that several blocks of rows are added to, or in its
        place rows of E, where all of them fit then and dW is written once.

        Args:
            rows: those of the call.
            weight: (V, D); its shape, dtype and device count.
            max_logits_bytes: the budget.
            keep: the head trains, so rows of E are kept for it.
            largest: the most rows that must be kept at the same time, None for all.
            temporaries: blocks of temporary_rows that the row work needs at the same time.
            vocab: V where it is not the weight's (a larger shard of another rank).
            device: where it is not the weight's (ranks that share a head cut the same chunks).
            narrow: the dtype of E where it is not the weight's.
            fused: E comes from a kernel that keeps logits off memory (kernels/exp_gemm.py).

        Raises:
            ValueError: the budget does not hold a single row.
        """
        dtype, width, most = weight.dtype, weight.shape[1], max_logits_bytes
        device = head_device(weight.device) if device is None else device
        columns = buffer_columns(weight.shape[0] if vocab is None else vocab, weight.device)
        counted = _HeadBuffers(columns, width, dtype, narrow or dtype, keep, fused)
        wide = counted.wide.itemsize
        # CUDA's products widen their result themselves; E in float32 beside a 16-bit weight needs a copy there too.
        upcasts = dtype.itemsize < wide and not (device.widens and counted.is_apart)
        upcast = min(_UPCAST_ROWS, columns, max(1, most // (32 * wide * max(width, _UPCAST_ROWS)))) if upcasts else 0
        # db adds E up in float32, from a copy of a few rows.
        temporaries = max(temporaries, int(keep and counted.is_apart))
        temporary = min(TEMPORARY_ROWS, max(1, most // (32 * wide * columns * max(temporaries, 1))))

        fixed = counted.fixed(upcast, temporary * temporaries)
        chunk_bytes, exp_bytes = total_bytes(counted.logits(1)), total_bytes(counted.exp("E", 1))
        room = most - total_bytes(fixed)
        if room < chunk_bytes + exp_bytes:
            least = [*counted.logits(1), *counted.exp("E", 1), *fixed]
            raise _too_few_bytes(columns, total_bytes(least), most, least)

        affordable = room // (chunk_bytes + exp_bytes)
        if counted.is_apart and (keep or device.kind != "cpu"):
            affordable = max(1, affordable // 2)  # rows of logits, which leave most of the room to E
        chunk = _aligned(min(max(rows, 1), _chunk_rows(device, columns, width), affordable))
        fitting = (room - chunk * chunk_bytes) // exp_bytes
        # What one block of rows saves: a float32 dW, which float16 has all the same (float16_scale.py).
        accumulates = dtype.itemsize < wide and dtype != torch.float16
        accumulator = wide * (weight.shape[0] if vocab is None else vocab) * width if accumulates else 0

        def plan(kept_rows: int, scratch_rows: int, chunk_rows: int) -> HeadPlan:
            buffers = [*fixed, *counted.logits(chunk_rows), *counted.exp("E", scratch_rows)]
            buffers += counted.exp("kept rows of E", kept_rows) if keep else []
            return HeadPlan(kept_rows, scratch_rows, upcast, temporary, chunk_rows, tuple(buffers))

        if not keep:
            # A CPU gains nothing by more rows than go through the products at their best.
            scratch = chunk if device.kind == "cpu" else even_rows(rows, _aligned(fitting))
            return plan(0, scratch, min(chunk, scratch))
        if (rows - fitting) * exp_bytes <= accumulator:
            return plan(rows, 0, chunk)
        if largest is not None and largest <= fitting:
            return plan(max(largest, _aligned(fitting)), 0, chunk)
        # With few rows computed again at a time dW is read and written often, with many fewer of them are kept: at
        # r rows it is (rows - fitting)/r times the cost of _DW_ROWS rows, and r more rows are computed again.
        best = math.isqrt(_DW_ROWS * (rows - fitting))
        scratch = _aligned(max(1, min(fitting // 2, max(chunk, best))))
        return plan(_aligned(fitting) - scratch, scratch, min(chunk, scratch))


def _aligned(rows: int) -> int:
    """The largest multiple of 128 in so many rows, where there is one."""
    return rows - rows % _ROW_MULTIPLE if rows > _ROW_MULTIPLE else rows


def _chunk_rows(device: HeadDevice, vocab: int, width: int) -> int:
    """Rows of logits that make an efficient product: 2,048 on an H100 at V = 128,256."""
    if device.kind == "cpu":
        return _CPU_SCRATCH_ROWS
    if not device.multiprocessors:
        return SCRATCH_ROWS
    rows = _ROUNDS * max(1.0, _WIDE / width) * device.multiprocessors * _GEMM_TILE / vocab
    return max(_ROW_MULTIPLE, 1 << math.ceil(math.log2(rows)))


@dataclass(frozen=True)
class _TileBuffers(_Buffers):
    """What TilePlan counts."""

    temporaries: int

    @property
    def upcasts(self) -> bool:
        """Whether products need a copy in float32 of the weight's tile, and of dW's before it is rounded."""
        return self.dtype.itemsize < self.wide.itemsize

    def tile(self, columns: int) -> list[Buffer]:
        """What a tile needs whatever its rows."""
        buffers = [Buffer("tile of the weight in float32", columns, self.width, self.wide)] if self.upcasts else []
        if self.upcasts and self.keep:
            buffers.append(Buffer("tile of dW in float32", columns, self.width, self.wide))
        return buffers

    def temporary(self, rows: int, columns: int) -> list[Buffer]:
        """Softcap's derivative and a statistic's product, for the rows that are worked on together."""
        return [Buffer("temporaries of the row work", self.temporaries * rows, columns, self.wide)]

    def copied(self, rows: int) -> list[Buffer]:
        """(R, D) matrices that exist at once: W_y is the weight's row of each target."""
        buffers = [Buffer("W_y", rows, self.width, self.wide)]
        if self.keep:
            buffers.append(Buffer("h and c ⊙ h", 2 * rows, self.width, self.wide))
        if self.upcasts:
            buffers.append(Buffer("h and dh in float32", 2 * rows, self.width, self.wide))
            buffers.append(Buffer("W_y before it is upcast", rows, self.width, self.dtype))
        return buffers

    def kept(self, rows: int, columns: int) -> list[Buffer]:
        """Rows of E that are kept, and the maximum that each tile of them is relative to."""
        tiles = -(-self.vocab // columns)
        return [
            Buffer("kept rows of E", rows, self.vocab, self.narrow),
            Buffer("maxima of the kept rows", rows, tiles, self.wide),
        ]


@dataclass(frozen=True)
class TilePlan:
    """How a call is cut into tiles of the vocabulary.

    Attributes:
        rows: rows that go through a tile at once.
        columns: columns of a tile.
        block_rows: rows of a tile that go through the row work together.
        kept_rows: rows of E that are kept at a time until their coefficients are known.
        buffers: what the plan allocates; at most max_logits_bytes together.
    """

    rows: int
    columns: int
    block_rows: int
    kept_rows: int
    buffers: tuple[Buffer, ...] = ()

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
        """Split the byte budget.

        Counted are logits, E, and copies of rows and of the head's tiles beside them: as HeadPlan.make counts.

        Args:
            rows: those of the call.
            weight: (V, D); its shape and dtype count.
            max_logits_bytes: the budget.
            options: softcap and statistics need temporaries.
            keep: the head trains, so rows of E are kept for it.
            largest: the most rows that must be kept at the same time, None for all.

        Raises:
            ValueError: the budget does not hold a single row.
        """
        (vocab, width), most = weight.shape, max_logits_bytes
        temporaries = (options.softcap is not None) + bool({"entropy", "log_sum_sq_probs"} & {*options.stats})
        counted = _TileBuffers(vocab, width, weight.dtype, scaleless_exp_dtype(weight.dtype), keep, temporaries)
        least = [*counted.logits(1, 1), *counted.copied(1), *counted.tile(1), *counted.temporary(1, 1)]
        least += counted.bias_gradient()
        # At least one whole row of logits, even if a tile of it would need less.
        least_bytes = max(total_bytes([Buffer("row", 1, vocab, counted.wide)]), total_bytes(least))
        if most < least_bytes:
            raise _too_few_bytes(vocab, least_bytes, most, least)

        room = most - total_bytes(counted.bias_gradient()) - total_bytes(counted.copied(1))
        together = max(1, min(rows, TILE_ROWS))
        column_bytes = total_bytes(counted.tile(1)) + total_bytes(counted.logits(together, 1))
        columns = even_rows(vocab, max(1, min(TILE_COLUMNS, room // 4 // column_bytes)))
        block = max(1, min(CACHE_BYTES, room // 8) // (columns * counted.wide.itemsize * max(temporaries, 1)))

        row_bytes = total_bytes([*counted.logits(1, columns), *counted.copied(1)])
        fixed = [*counted.bias_gradient(), *counted.tile(columns)]
        if total_bytes([*fixed, *counted.temporary(block, columns)]) + row_bytes > most:
            block = 1
        fixed += counted.temporary(block, columns)
        room = most - total_bytes(fixed)
        affordable = room // row_bytes

        def plan(at_once: int, kept_rows: int) -> TilePlan:
            buffers = (*fixed, *counted.logits(at_once, columns), *counted.copied(at_once))
            kept = counted.kept(kept_rows, columns) if keep else ()
            return TilePlan(at_once, columns, block, kept_rows, (*buffers, *kept))

        if not keep:
            return plan(even_rows(rows, min(TILE_ROWS, affordable)), 0)
        kept_bytes = total_bytes(counted.kept(1, columns))
        if counted.upcasts and rows * (kept_bytes + row_bytes) <= room:
            return plan(max(rows, 1), rows)  # no float32 dW beside the rounded one
        needed = rows if largest is None else min(rows, max(largest, KEPT_ROWS))
        at_once = even_rows(needed, min(TILE_ROWS, max(1, affordable // 4)))
        wanted = rows if largest is None else max(largest, even_rows(rows, needed))
        return plan(at_once, min(rows, wanted, (room - at_once * row_bytes) // kept_bytes))
