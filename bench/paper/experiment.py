"""Shared code of the experiments: command line, cells cached on disk, means over seeds with standard errors.

An experiment is a set of cells, such as (method, beta, seed). Each is computed once and stored as a JSON file in the
work folder, so that the same command resumes an interrupted experiment. The file contains the settings of the cell;
with other settings the cell is computed again.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import datasets
import torch
from tqdm import tqdm
from transformers.utils import logging

from bench.cases import RESULTS
from bench.record import write_record
from dpofast.common.atomic_files import put

PACKAGES = ("torch", "transformers", "trl", "numpy", "dpofast")
PAPER = Path(__file__).parent
SEEDS = (0, 1, 2)
Size = TypeVar("Size")


def arguments(name: str, doc: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line of an experiment.

    Returns:
        quick; work: the folder of its cells; pictures: the folder of its PNG; results: its JSON lines; processes and
        part: how many compute the cells, and which of them this is. A quick run leaves all files in its work folder,
        away from what is committed.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m bench.paper.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a version of less than a minute, which shows less")
    parser.add_argument("--work", type=Path, help=f"folder of what is computed; default build/paper/{name}[-quick]")
    parser.add_argument("--processes", type=int, default=1, help="of one thread each, that share the cells")
    parser.add_argument("--part", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.processes < 1:
        parser.error(f"--processes: expected 1 or more, got {args.processes}")
    args.name = name
    args.work = args.work or Path("build/paper") / (f"{name}-quick" if args.quick else name)
    args.work.mkdir(parents=True, exist_ok=True)
    args.pictures = args.work if args.quick else PAPER
    args.results = (args.work if args.quick else RESULTS) / "paper.jsonl"
    return args


def begin(
    name: str, doc: str, argv: Sequence[str] | None, full_size: Size, quick_size: Size, *, threads: int | None = 1
) -> tuple[argparse.Namespace, Size]:
    """Parse the command line, quiet the libraries, and choose the size. Returns arguments(...) and the size."""
    args = arguments(name, doc, argv)
    quiet(threads)
    return args, quick_size if args.quick else full_size


def cells(
    args: argparse.Namespace,
    settings: Mapping[str, Any],
    names: Sequence[str],
    compute: Callable[[str], dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Return compute(name) for every name, read from its file if an earlier run has stored it.

    Args:
        args: the result of arguments(). With args.processes > 1 this starts the other processes: each runs the
            experiment's command up to this call, computes its share of the cells, and exits.
        settings: JSON-serializable; must contain everything that changes a result.
        names: names of the cells, valid as file names.
        compute: returns the figures of one cell, JSON-serializable. Its run time is added under "seconds".

    Raises:
        ValueError: a figure is NaN or infinite, or a cell's file is damaged.
        RuntimeError: another process failed; its output is on stderr.
    """
    mine = names[args.part :: args.processes]
    if args.part:
        _cells(args, settings, mine, compute)
        raise SystemExit(0)
    options = [f"--processes={args.processes}", f"--work={args.work}", *(["--quick"] if args.quick else [])]
    command = [sys.executable, "-m", f"bench.paper.{args.name}", *options]
    others = [subprocess.Popen([*command, f"--part={part}"]) for part in range(1, args.processes)]
    try:
        found = _cells(args, settings, mine, compute)
    except BaseException:
        for other in others:
            other.terminate()
        raise
    failed = sum(other.wait() != 0 for other in others)
    if failed:
        raise RuntimeError(f"{failed} of {args.processes} processes failed; the same command goes on where they were")
    return _cells(args, settings, names, compute) if others else found


def _cells(
    args: argparse.Namespace,
    settings: Mapping[str, Any],
    names: Sequence[str],
    compute: Callable[[str], dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    known = json.loads(json.dumps(dict(settings)))
    found = {}
    for name in tqdm(names, desc=args.name, unit="cell", position=args.part):
        path = args.work / f"{name}.json"
        cell = _read(path)
        if cell.get("settings") != known:
            start = time.perf_counter()
            figures = compute(name)
            cell = {"settings": known, "figures": {**figures, "seconds": time.perf_counter() - start}}
            write_json(path, cell)
        found[name] = cell["figures"]
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); delete it, and the same command computes it again") from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file atomically.

    Raises:
        ValueError: a number in it is NaN or infinite.
    """
    aside = path.with_suffix(f".aside{os.getpid()}")  # an earlier run's process may still be writing the same
    aside.write_text(json.dumps(value, allow_nan=False))
    put(aside, path)


def quiet(threads: int | None = None) -> None:
    """Turn off the libraries' progress bars and warnings; set torch's number of threads where one is given."""
    if threads is not None:
        torch.set_num_threads(threads)
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds, and its standard error (0 of a single value)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def record(args: argparse.Namespace, name: str, figures: Mapping[str, Any]) -> None:
    """Append the experiment's JSON line."""
    command = f"python -m bench.paper.{name}" + (" --quick" if args.quick else "")
    write_record(args.results, f"paper/{name}", figures, command=command, packages=PACKAGES)


def publish(
    args: argparse.Namespace,
    figures: Mapping[str, Any],
    draw: Callable[[Mapping[str, Any], Path], None],
    table: Callable[[Mapping[str, Any]], str],
) -> None:
    """Draw the experiment's PNG, append its record and print its table."""
    draw(figures, args.pictures / f"{args.name}.png")
    record(args, args.name, figures)
    print(table(figures))
