"""The LM head of each implementation in one call: its products, the bytes of the work on logits, and its peak."""

import functools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from bench.roofline.devices import Device
from bench.roofline.layers import Precision, Shapes
from bench.roofline.models import ModelShape
from bench.roofline.work import Call, even_parts

# dpofast's plan is traced for a multiple of so many scored rows.
TRACED_ROWS = 32
# trl 1.16: rows and columns of a tile of logits.
TRL_ROWS, TRL_COLUMNS = 4096, 32_768
# Assumed of Liger's loss, which it compiles, bytes a logit in bfloat16: logits are read twice, for log-probs and means;
# in backward they are read, and their gradient is written and read.
LIGER_FORWARD, LIGER_BACKWARD = 4, 6
# Counted on the CPU in float32, bytes a logit: operators' inputs and outputs in a forward and in its backward; the peak
# without and with a gradient. trl runs a kernel's steps one by one there, and Liger is not compiled.
TRL_CPU, TRL_CPU_PEAK = (44, 106), (16, 33)
LIGER_CPU, LIGER_CPU_PEAK = (16, 24), (8, 12)
# dpofast on a CPU: rows of E kept at a time, and a tile's logits with what is computed from them.
CPU_KEPT_ROWS, CPU_TILE_BYTES = 1024, 64 << 20


@dataclass(frozen=True, kw_only=True)
class HeadCall:
    """What the head is asked in one call.

    Attributes:
        model, call, precision, device: what runs where.
        grad: hidden states need a gradient.
        trained: the head needs one too.
    """

    model: ModelShape
    call: Call
    precision: Precision
    device: Device
    grad: bool
    trained: bool

    @property
    def weights(self) -> int:
        """D·V."""
        return self.model.hidden * self.model.vocab

    @property
    def cast_bytes(self) -> int:
        """Bytes of casting the stored weight for the products."""
        stored, product = self.precision.weight, self.precision.product
        return self.weights * (stored + product) if product < stored else 0

    def products(self, rows: int, times: int = 1) -> Shapes:
        """Logits, dH and dW of these rows, as far as they are needed."""
        d, v = self.model.hidden, self.model.vocab
        gemms: Shapes = Counter({(rows, d, v): times})
        gemms[rows, v, d] += times * self.grad
        gemms[v, rows, d] += times * self.trained
        return +gemms


@dataclass(frozen=True, kw_only=True)
class HeadCost:
    """What a head does in one call.

    Attributes:
        gemms: its products, by shape.
        bytes: read and written beside the products.
        peak: bytes beyond hidden states, weight and the parameters' gradients.
        saved: of these, alive until the backward.
        operators: how many it starts.
    """

    gemms: Shapes
    bytes: float
    peak: float
    saved: float = 0
    operators: int = 50


Head = Callable[[HeadCall], HeadCost]


def full_logits(head: HeadCall) -> HeadCost:
    """All logits of all positions, float32 log-softmax, gather: 14 bytes a logit, and 22 in backward, in bfloat16."""
    rows, w = head.call.positions, head.precision.product
    to_float = w + 4 if w < 4 else 0
    forward, backward = to_float + 8, to_float + 16
    logits = rows * head.model.vocab
    return HeadCost(
        gemms=head.products(rows),
        bytes=logits * (forward + (backward if head.grad else 0)) + head.cast_bytes,
        peak=logits * (12 if head.grad else 8 if w == 4 else 10),
        saved=logits * 4 if head.grad else 0,
    )


def trl(head: HeadCall) -> HeadCost:
    """Tiles of 4,096 scored rows and 32,768 columns, computed again in backward; gradients are added up in float32."""
    rows, w, stored = head.call.targets, head.precision.product, head.precision.weight
    d, v = head.model.hidden, head.model.vocab
    tiles, columns = math.ceil(rows / TRL_ROWS), math.ceil(v / TRL_COLUMNS)
    moved = rows * v * w + head.cast_bytes * tiles
    peak = min(rows, TRL_ROWS) * TRL_COLUMNS * w
    if head.grad:
        moved += rows * v * 2 * w + head.cast_bytes * tiles + 8 * rows * d * columns
        peak += 4 * rows * d
    if head.trained:
        moved += 8 * d * v * tiles + (4 + stored) * d * v
        peak += 4 * d * v if stored < 4 else 0  # else it becomes the parameter's gradient
    return HeadCost(gemms=_trl_gemms(head, rows), bytes=moved, peak=peak, operators=8 * tiles * columns)


def trl_on_cpu(head: HeadCall) -> HeadCost:
    """The same tiles over every position but a row's last, prompts and pads too: what trl runs without Triton."""
    rows = head.call.grid
    return HeadCost(
        gemms=_trl_gemms(head, rows),
        bytes=rows * head.model.vocab * (sum(TRL_CPU) if head.grad else TRL_CPU[0]),
        peak=min(rows, TRL_ROWS) * TRL_COLUMNS * TRL_CPU_PEAK[head.grad],
    )


def _trl_gemms(head: HeadCall, rows: int) -> Shapes:
    d = head.model.hidden
    gemms: Shapes = Counter()
    for n in _chunks(rows, TRL_ROWS):
        for columns in _chunks(head.model.vocab, TRL_COLUMNS):
            gemms[n, d, columns] += 2 if head.grad else 1
            gemms[n, columns, d] += int(head.grad)
            gemms[columns, n, d] += int(head.trained)
    return +gemms


def liger(head: HeadCall) -> HeadCost:
    """liger-kernel 0.8.5's DPO loss: the whole rows of one pair at a time, and dW added up after each."""
    w = head.precision.product
    chunks, rows = _liger_chunks(head.call)
    each = (LIGER_FORWARD + (LIGER_BACKWARD if head.grad else 0)) * w / 2
    return HeadCost(
        gemms=head.products(rows, chunks),
        bytes=head.call.grid * head.model.vocab * each + head.cast_bytes + chunks * 3 * _liger_dw(head),
        peak=rows * head.model.vocab * (w + 4 + (w if head.grad else 0)) + _liger_dw(head),
        operators=12 * chunks,
    )


def liger_on_cpu(head: HeadCall) -> HeadCost:
    """The same, not compiled, as bench.head runs it on a CPU."""
    chunks, rows = _liger_chunks(head.call)
    moved = head.call.grid * head.model.vocab * (sum(LIGER_CPU) if head.grad else LIGER_CPU[0])
    return HeadCost(
        gemms=head.products(rows, chunks),
        bytes=moved + chunks * 3 * _liger_dw(head),
        peak=rows * head.model.vocab * LIGER_CPU_PEAK[head.grad] + _liger_dw(head),
    )


def _liger_chunks(call: Call) -> tuple[int, int]:
    """How many pairs, and the rows of logits of each."""
    chunks = max(1, call.sequences // 2)
    return chunks, call.grid // chunks


def _liger_dw(head: HeadCall) -> int:
    """Bytes of a chunk's own dW, which is added to the whole: two reads and a write."""
    return head.precision.weight * head.weights if head.trained else 0


def dpofast(head: HeadCall) -> HeadCost:
    """dpofast's own code on meta tensors, in bfloat16: every product and launch of its plan (bench/head/trace.py)."""
    d, v = head.model.hidden, head.model.vocab
    mode = "trained" if head.trained else "frozen" if head.grad else "forward"
    # The trace is of equal sequences, so that their number divides the rows.
    rows = -(-head.call.targets // TRACED_ROWS) * TRACED_ROWS
    cost = _traced(rows, d, v, mode, head.device.multiprocessors, int(head.device.memory))
    return replace(cost, bytes=cost.bytes + head.cast_bytes)


@functools.cache
def _traced(rows: int, d: int, v: int, mode: str, multiprocessors: int, memory: int) -> HeadCost:
    from bench.head.predict import Gpu, head_trace

    gpu = Gpu("", multiprocessors, memory, flop_per_second=1.0, bytes_per_second=1.0)
    trace = head_trace(rows, d, v, mode, gpu)
    moved = sum(launch.bytes for launch in trace.launches if launch.gemm is None)
    # A product that is added to its result reads that once more, in float32.
    moved += sum(4 * launch.gemm[0] * launch.gemm[2] for launch in trace.products if launch.accumulates)
    returned = 2 * d * v if mode == "trained" else 0
    return HeadCost(gemms=trace.gemms, bytes=moved, peak=trace.peak_bytes - returned, operators=len(trace.launches))


def dpofast_on_cpu(head: HeadCall) -> HeadCost:
    """Tiles of the vocabulary that stay in the processor's cache, so that the work on logits moves nothing else."""
    kept = 4 * head.model.vocab * min(head.call.targets, CPU_KEPT_ROWS) if head.trained else 0
    return HeadCost(gemms=head.products(head.call.targets), bytes=0, peak=kept + CPU_TILE_BYTES)


def _chunks(total: int, most: int) -> list[int]:
    """A total in even parts of at most `most`."""
    return even_parts(total, math.ceil(total / most))
