"""Check, count and time contenders in this process, in turns, against the bare matrix products (the floor)."""

import functools
import gc
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bench.cost import Cost
from bench.head.floor import FLOOR, Floor
from bench.head.peers import COMPILED, OURS
from bench.head.problem import Head, Problem, run
from bench.head.truth import Truth, gate
from bench.timing import interleave, seen, timed

# A contender this many times slower than the fastest is timed once.
HOPELESS = 6.0


@dataclass
class Entry:
    """One contender in one mode.

    Attributes:
        errors: of logps and gradients, as Truth.errors gives them.
        wrong: what fails the gate, in words; empty where nothing does.
        gemm_units, counted_bytes: exact; None where compiled code runs.
        seen_bytes: by the system; None where it cannot tell.
        seconds: one value a round.
    """

    errors: dict[str, float | None]
    wrong: str
    gemm_units: float | None = None
    counted_bytes: int | None = None
    seen_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)


def first_run(name: str, head: Head, problem: Problem, truth: Truth, mode: str) -> Entry:
    """Run a contender once: warm up, compare with the truth, count GEMMs and bytes."""
    device = problem.hidden.device

    def attempt() -> tuple[Tensor, tuple[Tensor, ...]]:
        return run(head, problem, mode)

    cost = None
    if name in COMPILED or (name == "liger" and device.type == "cuda"):
        attempt()
        (logps, grads), peak = seen(attempt, device)
    else:
        with Cost() as cost:
            (logps, grads), peak = seen(attempt, device)
    errors = truth.errors(logps, grads)
    entry = Entry(errors, gate(errors, problem.hidden.dtype, truth.limit(len(logps))))
    returned = sum(grad.untyped_storage().nbytes() for grad in grads)
    entry.seen_bytes = None if peak is None else max(0, peak - returned)
    if cost is not None:
        entry.gemm_units = cost.gemm_units(*problem.hidden.shape, len(problem.weight))
        entry.counted_bytes = cost.peak_bytes_beyond(*grads)
    return entry


def compare(problem: Problem, heads: dict[str, Head], truth: Truth, mode: str, rounds: int) -> dict[str, Any]:
    """Figures of every contender in one mode, and of the floor.

    Raises:
        ValueError: dpofast itself is wrong.
    """
    device = problem.hidden.device
    entries: dict[str, Entry] = {}
    failed: dict[str, str] = {}
    for name, head in heads.items():
        print(f"{mode}: {name}", flush=True)
        try:
            entries[name] = first_run(name, head, problem, truth, mode)
        except Exception as error:  # a peer may raise anything; the table shows its message
            if name in OURS:
                raise
            failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        else:
            if name in OURS and entries[name].wrong:
                raise ValueError(f"{name}, {mode}: {entries[name].wrong}; nothing is recorded")
    floor = Floor(problem)
    floor(mode)
    times: list[float] = []
    # Freeze what exists by now, so that the collection before each run takes no time.
    gc.collect()
    gc.freeze()
    for name in interleave([FLOOR, *entries], rounds):
        gc.collect()
        if name == FLOOR:
            times.append(timed(lambda: floor(mode), device))
            continue
        best = min((min(entry.seconds) for entry in entries.values() if entry.seconds), default=float("inf"))
        seconds = entries[name].seconds
        if not seconds or min(seconds) < HOPELESS * best:
            seconds.append(timed(functools.partial(run, heads[name], problem, mode), device))
    least = min(times)
    figures = {name: {**vars(entry), "floors": min(entry.seconds) / least} for name, entry in entries.items()}
    return {"floor_s": times, "contenders": figures, "failed": failed}
