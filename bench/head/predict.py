"""Predict the LM head's time on a GPU from a trace of its launches: a prediction, never a measurement.

    predict(8192, 4096, 128_256, "trained", H100).ratio     the time over that of the bare products

The model, for each launch in turn (they do not overlap):

- A product is made of tiles of 128 x 256 results, one a multiprocessor at a time, in rounds: a last round that is not
  full takes as long as the others. Where the tiles are few, K is divided, and the partial sums are written and read. To
  it comes RAMP, in which the first tiles are loaded and the last ones written. A product that is added to its result
  reads it once more, half of which is hidden.
- Everything else moves its bytes, at the rate that a row kernel reaches.
- Each launch, of whatever kind, costs GAP.

The rates of an H100 are 800 TFLOP/s in bfloat16 and 90 % of 3.0 TB/s.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from dataclasses import dataclass
from unittest import mock

import torch

import dpofast
from bench.head.trace import Launch, Trace, traced
from dpofast.head.planning import device

RAMP, GAP = 20e-6, 2e-6
# Rate of kernels/exp_gemm.py over cuBLAS's: an assumption, to be measured.
EXP_GEMM = 0.93
_TILE = (128, 256)
_SPLITS = (1, 2, 4, 8, 16)
# The products that each mode needs, in units of 2·N·D·V.
MODES = {"forward": 1, "frozen": 2, "trained": 3, "per token": 3}


@dataclass(frozen=True)
class Gpu:
    """A GPU: its multiprocessors, memory in bytes, and the rates that it reaches in 16 bits and from memory."""

    name: str
    multiprocessors: int
    memory_bytes: int
    flop_per_second: float
    bytes_per_second: float


H100 = Gpu("H100", 132, 80 << 30, 800e12, 0.9 * 3.0e12)
H200 = Gpu("H200", 132, 141 * 10**9, 790e12, 0.9 * 4.3e12)


@dataclass(frozen=True)
class Prediction:
    """What the head is predicted to take in one mode.

    Attributes:
        seconds: of all launches.
        ratio: seconds over the bare products' at the GPU's rate.
        units: products that are done, by whatever kernel, in units of 2·N·D·V.
        launches: kernels and copies.
        peak_bytes: the most that is alive at once beside the inputs.
    """

    seconds: float
    ratio: float
    units: float
    launches: int
    peak_bytes: int


def head_trace(
    n: int, d: int, v: int, mode: str, gpu: Gpu, max_logits_bytes: int | None = None, backend: str = "triton"
) -> Trace:
    """Trace one call and its backward in bfloat16: 32 sequences, fewer below 32 targets, as even as n allows.

    Args:
        n, d, v: targets, at least 2; hidden size and vocabulary, at least 1.
        mode: "forward", "frozen" and "trained": linear_preference_loss without a gradient, with one to hidden states,
            with one to the head too. "per token": linear_logprobs with both.
        gpu: for whose multiprocessors and memory the call is planned.
        max_logits_bytes, backend: as in linear_logprobs.

    Raises:
        ValueError: a size or max_logits_bytes is too small.
    """
    if n < 2 or min(d, v) < 1:
        raise ValueError(f"expected --n of at least 2, --d and --v of at least 1, got {n}, {d} and {v}")

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    hidden, weight = (new(rows, d, dtype=torch.bfloat16) for rows in (n, v))
    leaves = {"forward": [], "frozen": [hidden]}.get(mode, [hidden, weight])
    for leaf in leaves:
        leaf.requires_grad_()
    targets, options = new(n, dtype=torch.int64), {"backend": backend, "max_logits_bytes": max_logits_bytes}
    sequences = min(32, n // 2 * 2)
    cu_targets = (torch.arange(sequences + 1) * n // sequences).int()
    pairs, ref_logps = torch.arange(sequences, dtype=torch.int32).view(-1, 2), new(sequences)
    upstream = new(n)
    meta = device.HeadDevice("cuda", gpu.multiprocessors, gpu.memory_bytes)
    with mock.patch.object(device, "META", meta), traced() as trace:
        if mode == "per token":
            result = dpofast.linear_logprobs(hidden, weight, targets, **options).logps
        else:
            known = (hidden, weight, targets, cu_targets, pairs, ref_logps)
            result, upstream = dpofast.linear_preference_loss(*known, **options).loss, None
        if leaves:
            torch.autograd.grad(result, leaves, upstream)
    return trace


def seconds(launch: Launch, gpu: Gpu) -> float:
    """What one launch takes."""
    moved = launch.bytes / gpu.bytes_per_second
    if launch.gemm is None:
        return GAP + moved
    rows, inner, columns = launch.gemm
    shapes = {(rows, columns), (columns, rows)}
    arithmetic = min(_rounds(*shape, inner, split, gpu) for shape in shapes for split in _SPLITS)
    added = 0.5 * 4 * rows * columns / gpu.bytes_per_second if launch.accumulates else 0.0
    if launch.name == "_exp_gemm_kernel":
        # Persistent over the vocabulary, so that no round is left unfilled: the rate of the whole product.
        arithmetic = 2 * rows * inner * columns / (EXP_GEMM * gpu.flop_per_second)
    return GAP + RAMP + max(arithmetic, moved) + added


def _rounds(rows: int, columns: int, inner: int, split: int, gpu: Gpu) -> float:
    tiles = -(-rows // _TILE[0]) * -(-columns // _TILE[1]) * split
    rate = gpu.flop_per_second / gpu.multiprocessors
    each = 2 * _TILE[0] * _TILE[1] * -(-inner // split) / rate
    partial = 8 * rows * columns * split / gpu.bytes_per_second if split > 1 else 0.0
    return -(-tiles // gpu.multiprocessors) * each + partial


def predict(
    n: int, d: int, v: int, mode: str, gpu: Gpu, max_logits_bytes: int | None = None, backend: str = "triton"
) -> Prediction:
    """Predict the time of one call and its backward; arguments as in head_trace."""
    trace = head_trace(n, d, v, mode, gpu, max_logits_bytes, backend)
    total = sum(seconds(launch, gpu) for launch in trace.launches)
    floor = MODES[mode] * 2 * n * d * v / gpu.flop_per_second
    units = sum(math.prod(launch.gemm) for launch in trace.launches if launch.gemm is not None) / (n * d * v)
    return Prediction(total, total / floor, units, len(trace.launches), trace.peak_bytes)


def main(given: list[str] | None = None) -> int:
    """Print the predictions of every mode; 0, or 2 for what cannot be predicted, with the reason."""
    parser = argparse.ArgumentParser(prog="python -m bench.head.predict", description=__doc__.partition("\n")[0])
    parser.add_argument("--n", type=int, default=8192, help="targets")
    parser.add_argument("--d", type=int, default=4096, help="hidden size")
    parser.add_argument("--v", type=int, default=128_256, help="vocabulary")
    parser.add_argument("--max_logits_bytes", type=int)
    arguments = parser.parse_args(given)
    shape = (arguments.n, arguments.d, arguments.v)
    cases = list(itertools.product((H100, H200), ("triton", "fused"), MODES))
    try:
        predictions = [predict(*shape, mode, gpu, arguments.max_logits_bytes, backend) for gpu, backend, mode in cases]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"PREDICTED, nothing ran on a GPU: N {shape[0]}, D {shape[1]}, V {shape[2]}, bfloat16")
    for (gpu, backend, mode), found in zip(cases, predictions, strict=True):
        print(
            f"{gpu.name} {backend:<6} {mode:<10} {found.seconds * 1e3:6.2f} ms, {found.ratio:.3f} of the products; "
            f"{found.units:g} units, {found.launches} launches, peak {found.peak_bytes / 1e9:.2f} GB"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
