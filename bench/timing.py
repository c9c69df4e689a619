"""How the benchmarks measure: contenders alternate in child processes, and every result is one JSON line.

Contenders are compared as A B A B on one machine, each run in a process of its own, so that a drifting clock rate or
a busy neighbour touches all of them and no run inherits another's memory. Times are given as the median with the
20th and 80th percentile.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpofast.common.memory import peak_resident, restart_peak_resident


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


def device() -> dict[str, Any]:
    """The processor's name, the cores this process may use, and the machine's memory in bytes."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE)):
        name = found.group(1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": name, "cores": cores, "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")}


def commit() -> str:
    """The checked-out commit, marked -dirty when tracked files differ from it; "unknown" outside a git checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:  # no git here
        return "unknown"
    return described.stdout.strip() if described.returncode == 0 else "unknown"


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those of the packages that are installed, and Python's own."""
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def write_record(
    path: Path, name: str, figures: Mapping[str, Any], *, command: str, packages: Iterable[str]
) -> dict[str, Any]:
    """Append one result to a .jsonl file; earlier lines stay as they are.

    Args:
        path: the file, made with its folder when absent.
        name: what was measured.
        figures: JSON-serializable results; NaN and infinity are refused.
        command: how to get the figures again, with paths relative to the repository.
        packages: distributions whose versions matter.

    Returns:
        The record: name, date, commit, command, device, versions, figures.

    Raises:
        ValueError: a figure is NaN or infinite.
    """
    record = {
        "name": name,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": command,
        "device": device(),
        "versions": installed(packages),
        "figures": dict(figures),
    }
    line = json.dumps(record, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")
    return record
