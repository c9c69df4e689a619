"""The LM head of each implementation in one call: its products, the bytes of the work on logits, and its peak."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from bench.roofline.layers import Precision, Shapes
from bench.roofline.models import ModelShape
from bench.roofline.work import Call

# max_logits_bytes of dpofast, and the rows that go through its logits at a time.
BUDGET, CHUNK_ROWS = 1 << 30, 1024
# trl 1.16: rows and columns of a tile of logits.
TRL_ROWS, TRL_COLUMNS = 4096, 32_768
# Compiled by Liger: logits are read to reduce them, their gradient is read and written, their means are read.
LIGER_FORWARD, LIGER_BACKWARD = 4, 6
# Counted on the CPU in float32 (operators' inputs and outputs, bytes a logit): trl runs a kernel's steps one by one.
TRL_CPU_FORWARD, TRL_CPU_BACKWARD, TRL_CPU_PEAK = 44, 106, 61


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
    rows, d, v, w = call.positions, model.hidden, model.vocab, precision.product
    to_float = w + 4 if w < 4 else 0
    forward, backward = to_float + 8, to_float + 16
    gemms: Shapes = Counter({(rows, d, v): 1})
    if grad:
        gemms[rows, v, d] += 1
    if trained:
        gemms[v, rows, d] += 1
    logits = rows * v
    return HeadCost(
        gemms=gemms,
        bytes=logits * (forward + (backward if grad else 0)) + _weight_cast(model, precision),
        peak=logits * (12 if grad else 8 if w == 4 else 10),
        saved=logits * 4 if grad else 0,
    )


def trl(model: ModelShape, call: Call, precision: Precision, grad: bool, trained: bool) -> HeadCost:
    """Tiles of 4,096 scored rows and 32,768 columns, computed again in backward; gradients are added up in float32."""
    rows, d, v, w = call.targets, model.hidden, model.vocab, precision.product
    gemms = _trl_gemms(rows, d, v, grad, trained)
    tiles = math.ceil(rows / TRL_ROWS)
    cast = _weight_cast(model, precision) * tiles
    moved = rows * v * w + cast
    peak = min(rows, TRL_ROWS) * min(v, TRL_COLUMNS) * w
    if grad:
        moved += rows * v * 2 * w + cast + 8 * rows * d * math.ceil(v / TRL_COLUMNS)
        peak += 4 * rows * d
    if trained:
        moved += 8 * d * v * tiles + (4 + precision.weight) * d * v
        peak += 4 * d * v
    return HeadCost(gemms=gemms, bytes=moved, peak=peak, operators=8 * tiles * math.ceil(v / TRL_COLUMNS))


def trl_on_cpu(model: ModelShape, call: Call, precision: Precision, grad: bool, trained: bool) -> HeadCost:
    """The same tiles over every position but a row's last, prompts and pads too: what trl runs without Triton."""
    rows, tile = call.grid, min(call.grid, TRL_ROWS) * min(model.vocab, TRL_COLUMNS)
    return HeadCost(
        gemms=_trl_gemms(rows, model.hidden, model.vocab, grad, trained),
        bytes=rows * model.vocab * (TRL_CPU_FORWARD + (TRL_CPU_BACKWARD if grad else 0)),
        peak=tile * (TRL_CPU_PEAK if grad else TRL_CPU_FORWARD),
    )


def _trl_gemms(rows: int, d: int, v: int, grad: bool, trained: bool) -> Shapes:
    gemms: Shapes = Counter()
    for n in _even(rows, TRL_ROWS):
        for columns in _even(v, TRL_COLUMNS):
            gemms[n, d, columns] += 2 if grad else 1
            if grad:
                gemms[n, columns, d] += 1
            if trained:
                gemms[columns, n, d] += 1
    return gemms


def liger(model: ModelShape, call: Call, precision: Precision, grad: bool, trained: bool) -> HeadCost:
    """liger-kernel 0.8.5's DPO loss: the whole rows of one pair at a time, and dW added up after each."""
    d, v, w = model.hidden, model.vocab, precision.product
    chunks = max(1, call.sequences // 2)
    rows = call.grid // chunks
    gemms: Shapes = Counter({(rows, d, v): chunks})
    moved = call.grid * v * (LIGER_FORWARD + (LIGER_BACKWARD if grad else 0)) * w / 2
    moved += _weight_cast(model, precision)
    peak = rows * v * (w + 4)
    if grad:
        gemms[rows, v, d] += chunks
        peak += rows * v * w
    if trained:
        gemms[v, rows, d] += chunks
        moved += chunks * 3 * precision.weight * d * v
        peak += 2 * precision.weight * d * v
    return HeadCost(gemms=gemms, bytes=moved, peak=peak, operators=12 * chunks)


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
    chunk = _even(rows, CHUNK_ROWS)
    for n in chunk:
        gemms[n, d, v] += 1
    blocks = _even(rows, kept) if kept else []
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
    rows, d, v = call.targets, model.hidden, model.vocab
    gemms: Shapes = Counter({(rows, d, v): 1})
    if grad:
        gemms[rows, v, d] += 1
    if trained:
        gemms[v, rows, d] += 1
    return HeadCost(gemms=gemms, bytes=0, peak=min(BUDGET, 4 * rows * v) if trained else 64 << 20)


def _even(total: int, most: int) -> list[int]:
    """Parts of at most `most`, as even as whole numbers are."""
    parts = math.ceil(total / most)
    return [total // parts + (part < total % parts) for part in range(parts)]


def _weight_cast(model: ModelShape, precision: Precision) -> float:
    """Bytes of casting a stored weight for the products."""
    narrower = precision.product < precision.weight
    return model.hidden * model.vocab * (precision.weight + precision.product) if narrower else 0
