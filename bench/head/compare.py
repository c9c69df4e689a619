"""Check, count and time contenders in this process, in turns, against the bare matrix products (the floor)."""

import functools
import gc
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bench.cost import Cost
from bench.head.floor import Floor
from bench.head.peers import COMPILED, OURS
from bench.head.problem import Head, Problem, run
from bench.head.truth import Truth, gate
from bench.timing import Paired, launch_seconds, seen, timed

# A contender this many times slower than the fastest is timed once.
HOPELESS = 6.0
# Seconds that must be left for another round.
ENOUGH_S = 5.0


@dataclass
class Entry:
    """One contender in one mode.

    Attributes:
        errors: of logps and gradients, as Truth.errors gives them.
        wrong: what fails the gate, in words; empty where nothing does.
        gemm_units, counted_bytes: exact; None where compiled code runs.
        seen_bytes: by the system; None where it cannot tell.
        paired: its times, each with the floor's right before it.
    """

    errors: dict[str, float | None]
    wrong: str
    gemm_units: float | None = None
    counted_bytes: int | None = None
    seen_bytes: int | None = None
    paired: Paired = field(default_factory=Paired)

    def figures(self) -> dict[str, Any]:
        """What is recorded; `floors` is the median ratio to the floor, `floors_spread` has p20 and p80 too."""
        ratio = self.paired.ratio()
        own = {name: value for name, value in vars(self).items() if name != "paired"}
        return {**own, "seconds": self.paired.seconds, "floors": ratio["median"], "floors_spread": ratio}


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


def compare(
    problem: Problem,
    heads: dict[str, Head],
    truth: Truth,
    mode: str,
    rounds: int,
    left: Callable[[], float] = lambda: math.inf,
    keep_wrong: bool = False,
) -> dict[str, Any]:
    """Figures of every contender in one mode, and of the floor.

    Args:
        problem, heads, truth, mode: what is compared.
        rounds: pairs of times of every contender; fewer where `left`, in seconds, comes to an end.
        left: how long this may still take.
        keep_wrong: dpofast's own errors do not end the comparison: what is wrong says so in `wrong`, what does not run
            stands in `failed`.

    Raises:
        ValueError: dpofast itself is wrong, unless keep_wrong.
    """
    device = problem.hidden.device
    entries: dict[str, Entry] = {}
    failed: dict[str, str] = {}
    for name, head in heads.items():
        print(f"{mode}: {name}", flush=True)
        try:
            entries[name] = first_run(name, head, problem, truth, mode)
        except Exception as error:  # a peer may raise anything; the table shows its message
            if name in OURS and not keep_wrong:
                raise
            failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        else:
            if name in OURS and entries[name].wrong and not keep_wrong:
                raise ValueError(f"{name}, {mode}: {entries[name].wrong}; nothing is recorded")
    floor = Floor(problem)
    floor(mode)
    runs = {name: functools.partial(run, heads[name], problem, mode) for name in entries}
    ahead = {name: launch_seconds(function, device) for name, function in runs.items()}
    # Freeze what exists by now, so that the collection before each run takes no time.
    gc.collect()
    gc.freeze()
    for _ in range(rounds):
        for name, entry in entries.items():
            measured = [min(other.paired.seconds) for other in entries.values() if other.paired.seconds]
            best = min(measured, default=math.inf)
            if entry.paired.seconds and (min(entry.paired.seconds) >= HOPELESS * best or left() < ENOUGH_S):
                continue
            gc.collect()
            floor_s = timed(lambda: floor(mode), device)
            entry.paired.add(floor_s, timed(runs[name], device, ahead_s=ahead[name]))
    floors = [seconds for entry in entries.values() for seconds in entry.paired.base_seconds]
    return {
        "floor_s": floors,
        "contenders": {name: entry.figures() for name, entry in entries.items()},
        "failed": failed,
    }
