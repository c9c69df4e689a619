"""`dpofast tune`: time the LM head's two ways on this GPU, and write the table that backend="auto" reads.

For each mode (no gradient, a frozen head, a trained one) and shape, the backend "triton" (a product, then row kernels)
and "fused" (one kernel that writes E) alternate, and the median of each is kept. "auto" then takes the faster one where
a call's shape is near a measured one.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from dpofast.cli.arguments import parse
from dpofast.common.tuning.table import MODES, Measured, device_key, read_table, table_path, write_entries
from dpofast.head.linear_logprobs import linear_logprobs

_BACKENDS = ("triton", "fused")
# Log-probs of the two may differ by roundings of 16-bit products' float32 sums.
_TOLERANCE = 1e-2


@dataclass(kw_only=True)
class TuneArguments:
    """Options of `dpofast tune`."""

    rows: list[int] = field(default_factory=lambda: [1024, 8192], metadata={"help": "Targets of a call, N."})
    width: list[int] = field(default_factory=lambda: [896, 2048, 4096], metadata={"help": "Hidden size, D."})
    vocab: list[int] = field(default_factory=lambda: [128_256], metadata={"help": "Vocabulary, V."})
    dtype: str = field(default="bfloat16", metadata={"help": "bfloat16 or float16."})
    rounds: int = field(default=7, metadata={"help": "Timed calls of each backend at each shape, at least 1."})
    output: str | None = field(
        default=None,
        metadata={"help": "The table's file; not set: $DPOFAST_TUNED, or dpofast/tuned.json in the cache."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Forget what the file holds."})
    dry: bool = field(
        default=False,
        metadata={
            "help": "A tiny shape in float16 on the CPU in Triton's interpreter (TRITON_INTERPRET=1), whatever else is "
            "asked for: a test, no times to go by."
        },
    )

    def __post_init__(self) -> None:
        """Check what is cheap to check."""
        for name in ("rows", "width", "vocab"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise ValueError(f"{name}: expected sizes of at least 1, got {values}")
        if self.dtype not in ("bfloat16", "float16"):
            raise ValueError(f"dtype: expected bfloat16 or float16, got {self.dtype!r}")
        if self.rounds < 1:
            raise ValueError(f"rounds: expected a number of at least 1, got {self.rounds}")


def main(argv: Sequence[str]) -> int:
    """Measure, print and write; returns 0."""
    options, _ = parse((TuneArguments,), argv, prog="dpofast tune", description=__doc__)
    path = Path(options.output) if options.output else table_path()
    device = tuning_device(dry=options.dry)
    if options.dry:
        # The interpreter's tl.dot is wrong in bfloat16.
        options = replace(options, rows=[24], width=[16], vocab=[100], dtype="float16", rounds=1)
    # A damaged file, or a folder that cannot be made, is refused before anything is measured.
    path.parent.mkdir(parents=True, exist_ok=True)
    if not options.overwrite:
        read_table(path)
    print(f"measuring on {device_key(device)}")
    entries: list[Measured] = []
    for mode in MODES:
        for width in options.width:
            for vocab in options.vocab:
                for rows in options.rows:
                    entry = measure(mode, rows, width, vocab, options.dtype, device, options.rounds)
                    if entry is not None:
                        # At once: what is measured is not lost.
                        overwrite = options.overwrite and not entries
                        write_entries(path, device_key(device), [entry], overwrite=overwrite)
                        entries.append(entry)
                        print(entry, flush=True)
    if not entries:
        raise ValueError("no shape fits in this GPU's memory: give fewer --rows or a smaller --vocab")
    print(f"wrote {path}")
    return 0


def tuning_device(*, dry: bool) -> torch.device:
    """The GPU that is measured, or with `dry` the CPU.

    Raises:
        ValueError: there is no GPU that torch can use.
    """
    if dry:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            "dpofast tune measures on a GPU, and torch sees none: it needs a CUDA or ROCm device and a torch built for "
            "it (`dpofast info` shows both). `TRITON_INTERPRET=1 dpofast tune --dry` tries the same calls on the CPU"
        )
    return torch.device("cuda", torch.cuda.current_device())


def measure(
    mode: str, rows: int, width: int, vocab: int, dtype: str, device: torch.device, rounds: int
) -> Measured | None:
    """Median times of both backends at one shape, alternating; None where it does not fit in memory.

    Raises:
        ValueError: the two disagree on the log-probs.
    """
    generator = torch.Generator(device).manual_seed(0)
    try:
        hidden, weight = (
            torch.randn(size, width, generator=generator, device=device).to(getattr(torch, dtype))
            for size in (rows, vocab)
        )
        weight *= 3 / width**0.5
        targets = torch.randint(vocab, (rows,), generator=generator, device=device)
        hidden.requires_grad_(mode != "forward")
        weight.requires_grad_(mode == "trained")
        calls = {name: _call(hidden, weight, targets, name) for name in _BACKENDS}
        logps = {name: call() for name, call in calls.items()}
        if not (difference := float((logps["fused"] - logps["triton"]).abs().max())) <= _TOLERANCE:
            raise ValueError(
                f"backend='fused' gives other log-probs than 'triton' at N={rows}, D={width}, V={vocab}, {dtype}: they "
                f"differ by {difference:.1e} nats. Nothing was written; please report it"
            )
        times: dict[str, list[float]] = {name: [] for name in _BACKENDS}
        for _ in range(rounds):
            for name, call in calls.items():
                times[name].append(_milliseconds(call, device))
    except torch.OutOfMemoryError:
        print(f"{mode} N={rows} D={width} V={vocab}: does not fit in memory, left out", file=sys.stderr)
        return None
    triton_ms, fused_ms = (statistics.median(times[name]) for name in _BACKENDS)
    return Measured(mode, rows, width, vocab, dtype, triton_ms, fused_ms)


def _call(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, backend: str
) -> Callable[[], torch.Tensor]:
    leaves = [leaf for leaf in (hidden, weight) if leaf.requires_grad]

    def call() -> torch.Tensor:
        logps = linear_logprobs(hidden, weight, targets, backend=backend).logps
        if leaves:
            torch.autograd.grad(logps.sum(), leaves)
        return logps.detach()

    return call


def _milliseconds(call: Callable[[], torch.Tensor], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    call()
    after.record()
    after.synchronize()
    return before.elapsed_time(after)
