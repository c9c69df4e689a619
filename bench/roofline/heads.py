"""The LM head of each implementation in one call: its products, the bytes of the work on logits, and its peak."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from bench.roofline.layers import Precision, Shapes
from bench.roofline.models import ModelShape
from bench.roofline.work import Call, even_parts

# max_logits_bytes of dpofast, and the rows that go through its logits at a time.
BUDGET, CHUNK_ROWS = 1 << 30, 1024
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


# model, call, precision, whether there is a gradient at all, whether the head trains
Head = Callable[[ModelShape, Call, Precision, bool, bool], HeadCost]


def full_logits(model: ModelShape, call: Call, precision: Precision, grad: bool, trained: bool) -> HeadCost:
    """All logits of all positions, float32 log-softmax, gather: 14 bytes a logit, and 22 in backward, in bfloat16."""
    rows, v, w = call.positions, model.vocab, precision.product
    to_float = w + 4 if w < 4 else 0
    forward, backward = to_float + 8, to_float + 16
    logits = rows * v
    return HeadCost(
        gemms=_three_products(rows, model, grad, trained),
        bytes=logits * (forward + (backward if grad else 0)) + _weight_cast(model, precision),
        peak=logits * (12 if grad else 8 if w == 4 else 10),
        saved=logits * 4 if grad else 0,
    )


def trl(model: ModelShape, call: Call, precision: Precision, grad: bool, trained: bool) -> HeadCost:
    """Tiles of 4,096 scored rows and 32,768 columns, computed again in backward; gradients are added up in float32."""
    rows, d, v, w = call.targets, model.hidden, model.vocab, precision.product
    tiles, columns = math.ceil(rows / TRL_ROWS), math.ceil(v / TRL_COLUMNS)
    cast = _weight_cast(model, precision) * tiles
    moved = rows * v * w + cast
    peak = min(rows, TRL_ROWS) * TRL_COLUMNS * w
    if grad:
        moved += rows * v * 2 * w + cast + 8 * rows * d * columns
        peak += 4 * rows * d
    if trained:
        moved += 8 * d * v * tiles + (4 + precision.weight) * d * v
        peak += 4 * d * v if precision.weight < 4 else 0  # else it becomes the parameter's gradient
    gemms = _trl_gemms(rows, d, v, grad, trained)
    return HeadCost(gemms=gemms, bytes=moved, peak=peak, operators=8 * tiles * columns)


def trl_on_cpu(model: ModelShape, call: Call, precision: Precision, grad: bool, trained: bool) -> HeadCost:
    """The same tiles over every position but a row's last, prompts and pads too: what trl runs without Triton."""
    rows = call.grid
    return HeadCost(
        gemms=_trl_gemms(rows, model.hidden, model.vocab, grad, trained),
        bytes=rows * model.vocab * (sum(TRL_CPU) if grad else TRL_CPU[0]),
        peak=min(rows, TRL_ROWS) * TRL_COLUMNS * TRL_CPU_PEAK[grad],
    )


def _trl_gemms(rows: int, d: int, v: int, grad: bool, trained: bool) -> Shapes:
    gemms: Shapes = Counter()
    for n in _chunks(rows, TRL_ROWS):
        for columns in _chunks(v, TRL_COLUMNS):
            gemms[n, d, columns] += 2 if grad else 1
            gemms[n, columns, d] += int(grad)
            gemms[columns, n, d] += int(trained)
    return +gemms


def liger(model: ModelShape, call: Call, precision: Precision, grad: bool, trained: bool) -> HeadCost:
    """liger-kernel 0.8.5's DPO loss: the whole rows of one pair at a time, and dW added up after each."""
    w = precision.product
    chunks, rows = _liger_chunks(call)
    each = (LIGER_FORWARD + (LIGER_BACKWARD if grad else 0)) * w / 2
    return HeadCost(
        gemms=_three_products(rows, model, grad, trained, chunks),
        bytes=call.grid * model.vocab * each
        + _weight_cast(model, precision)
        + _liger_sums(model, precision, chunks, trained),
        peak=rows * model.vocab * (w + 4 + (w if grad else 0)) + _liger_dw(model, precision, trained),
        operators=12 * chunks,
    )


def liger_on_cpu(model: ModelShape, call: Call, precision: Precision, grad: bool, trained: bool) -> HeadCost:
    """The same, not compiled, as bench.head runs it on a CPU."""
    chunks, rows = _liger_chunks(call)
    moved = call.grid * model.vocab * (sum(LIGER_CPU) if grad else LIGER_CPU[0])
    return HeadCost(
        gemms=_three_products(rows, model, grad, trained, chunks),
        bytes=moved + _liger_sums(model, precision, chunks, trained),
        peak=rows * model.vocab * LIGER_CPU_PEAK[grad] + _liger_dw(model, precision, trained),
    )


def _liger_chunks(call: Call) -> tuple[int, int]:
    """How many pairs, and the rows of logits of each."""
    chunks = max(1, call.sequences // 2)
    return chunks, call.grid // chunks


def _liger_sums(model: ModelShape, precision: Precision, chunks: int, trained: bool) -> int:
    """Bytes of adding the dW of every chunk."""
    return chunks * 3 * precision.weight * model.hidden * model.vocab if trained else 0


def _liger_dw(model: ModelShape, precision: Precision, trained: bool) -> int:
    """Bytes of a chunk's own dW."""
    return precision.weight * model.hidden * model.vocab if trained else 0


def _three_products(rows: int, model: ModelShape, grad: bool, trained: bool, times: int = 1) -> Shapes:
    """Logits, dH and dW of these rows, as far as they are needed."""
    d, v = model.hidden, model.vocab
    gemms: Shapes = Counter({(rows, d, v): times})
    gemms[rows, v, d] += times * grad
    gemms[v, rows, d] += times * trained
    return +gemms


def dpofast(model: ModelShape, call: Call, precision: Precision, grad: bool, trained: bool) -> HeadCost:
    """Scored rows in even chunks; E is kept in 16 bits for one product E·W and one Eᵀ·h over all kept rows.

    All rows are kept where their E takes no more than the budget and a float32 dW (4·V·D bytes) together; elsewhere
    as many as fit the budget, and dW is added up in float32.
    """
    rows, d, v, w = call.targets, model.hidden, model.vocab, precision.product
    if not grad:
        kept = 0
    elif trained and w * rows * v <= BUDGET + 4 * d * v:
        kept = rows
    else:
        kept = min(rows, max(1, BUDGET // (w * v)))
    gemms: Shapes = Counter()
    chunk = _chunks(rows, CHUNK_ROWS)
    for n in chunk:
        gemms[n, d, v] += 1
    blocks = _chunks(rows, kept) if kept else []
    for n in blocks:
        gemms[n, v, d] += 1
        if trained:
            gemms[v, n, d] += 1
    moved = rows * v * ((4 + w if w < 4 else 8) if grad else 4) + _weight_cast(model, precision)
    peak = max(chunk) * v * 4 + kept * v * w + (4 * rows * d if grad else 0)
    if trained and len(blocks) > 1:
        moved += len(blocks) * 8 * d * v + 6 * d * v
        peak += 4 * d * v
    return HeadCost(gemms=gemms, bytes=moved, peak=peak, operators=2 * len(chunk) + 2 * len(blocks) + 10)


def dpofast_on_cpu(model: ModelShape, call: Call, precision: Precision, grad: bool, trained: bool) -> HeadCost:
    """Tiles of the vocabulary that stay in the processor's cache, so that the work on logits moves nothing else."""
    kept = 4 * model.vocab * min(call.targets, CPU_KEPT_ROWS) if trained else 0
    gemms = _three_products(call.targets, model, grad, trained)
    return HeadCost(gemms=gemms, bytes=0, peak=kept + CPU_TILE_BYTES)


def _chunks(total: int, most: int) -> list[int]:
    """A total in even parts of at most `most`."""
    return even_parts(total, math.ceil(total / most))


def _weight_cast(model: ModelShape, precision: Precision) -> float:
    """Bytes of casting a stored weight for the products."""
    narrower = precision.product < precision.weight
    return model.hidden * model.vocab * (precision.weight + precision.product) if narrower else 0
