"""The record of a benchmark: one JSON line with figures, device, versions, commit and command."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def command_line(module: str, arguments: Sequence[str] | None = None) -> str:
    """The command that runs a module with the arguments (default: this process's), quoted for a shell."""
    return shlex.join(["python", "-m", module, *(sys.argv[1:] if arguments is None else arguments)])


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


def make_record(name: str, figures: Mapping[str, Any], *, command: str, packages: Iterable[str]) -> dict[str, Any]:
    """What write_record appends; the arguments are its own."""
    return {
        "name": name,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": command,
        "device": device(),
        "versions": installed(packages),
        "figures": dict(figures),
    }


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Append a record to a .jsonl file, made with its folder when absent; earlier lines stay as they are.

    Raises:
        ValueError: a figure is NaN or infinite.
    """
    line = json.dumps(record, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file, oldest first: none where it is missing, without a last line that was cut."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


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
    record = make_record(name, figures, command=command, packages=packages)
    append(path, record)
    return record
