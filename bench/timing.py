"""How the benchmarks measure: contenders alternate, in this process or in child processes, and times are spreads.

Contenders are compared as A B A B on one machine, so that a drifting clock rate or a busy neighbour affects all of
them; a run in a process of its own inherits no other run's memory. Times are given as the median with the 20th and
80th percentile.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpofast.common.memory import peak_resident, restart_peak_resident

# Cycles a second of torch.cuda._sleep at a high clock rate; at a lower one it spins longer.
SPIN_HZ = 2_000_000_000


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile of at least one value, linearly interpolated.

    Raises:
        ValueError: no values.
    """
    if len(values) == 0:
        raise ValueError("values: expected at least one measurement, got none")
    p20, median, p80 = np.percentile(values, (20, 50, 80))
    return {"median": float(median), "p20": float(p20), "p80": float(p80)}


def interleave(contenders: Sequence[str], rounds: int) -> Iterator[str]:
    """A B A B ...: every contender once a round."""
    for _ in range(rounds):
        yield from contenders


def load_at_start(busy: float = 1.0) -> float:
    """The machine's load, the mean number of runnable processes over the last minute; above `busy`, warn on stderr."""
    load = os.getloadavg()[0]
    if load > busy:
        print(f"warning: the machine is busy (load {load:.1f}), so times mean little", file=sys.stderr, flush=True)
    return load


class PeakMemory:
    """Peak resident memory of this process above what it held when the object was made (Linux).

    The kernel's high-water mark (VmHWM) is lowered to the present size first, so a peak during the imports does not
    count. ru_maxrss would not do: it cannot be lowered, and a child starts with its parent's.
    """

    def __init__(self) -> None:
        """Lower the high-water mark and note where it stands.

        Raises:
            RuntimeError: the system has no /proc/self/clear_refs that this process may write.
        """
        self.start = restart_peak_resident()

    def increase(self) -> int:
        """Bytes by which the peak so far exceeds the start."""
        return peak_resident() - self.start


def timed(function: Callable[[], Any], device: torch.device, calls: int = 1, ahead_s: float = 1e-3) -> float:
    """Seconds of one call, the mean of `calls` in a row; on a GPU its own time, by events.

    A GPU first spins for about `ahead_s` seconds, so that the launches are queued before their turn comes: in training,
    too, the host runs ahead. launch_seconds says how long that takes.
    """
    if device.type == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(int(SPIN_HZ * ahead_s))
        start.record()
        for _ in range(calls):
            function()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1000 / calls
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - begin) / calls


def launch_seconds(function: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """How long `timed` should spin: what the host takes to launch `calls` calls and half as much, from 1 to 20 ms.

    On a CPU nothing runs, and the answer is 0.
    """
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    launched = time.perf_counter() - begin
    torch.cuda.synchronize()
    return min(max(1.5 * launched, 1e-3), 20e-3)


@dataclass
class Paired:
    """Times of a contender and of a baseline, each pair measured one right after the other.

    A drift of the clock rate, a warmer chip or a busy neighbour affects both of a pair, and cancels in their ratio.

    Attributes:
        seconds, base_seconds: one value each for every pair.
    """

    seconds: list[float] = field(default_factory=list)
    base_seconds: list[float] = field(default_factory=list)

    def add(self, base_seconds: float, seconds: float) -> None:
        """Keep a pair."""
        self.base_seconds.append(base_seconds)
        self.seconds.append(seconds)

    def ratio(self) -> dict[str, float]:
        """Median, p20 and p80 of the pairs' ratios, the contender's time over the baseline's."""
        return spread([time / base for base, time in zip(self.base_seconds, self.seconds, strict=True)])


def seen(function: Callable[[], Any], device: torch.device) -> tuple[Any, int | None]:
    """The function's result, and the peak increase of memory while it ran; None where the system cannot tell."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before
    try:
        memory = PeakMemory()
    except RuntimeError:
        return function(), None
    return function(), memory.increase()


def run_child(module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """Run `python -m module *arguments --out FILE` with extra environment variables and return the JSON of FILE.

    Raises:
        RuntimeError: the child failed; the message ends with what it last said.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        child = subprocess.run(
            [sys.executable, "-m", module, *arguments, "--out", str(out)],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if child.returncode != 0 or not out.exists():
            said = "\n".join(child.stdout.splitlines()[-30:])
            raise RuntimeError(f"{module} {' '.join(arguments)} ended with code {child.returncode}:\n{said}")
        return json.loads(out.read_text())
