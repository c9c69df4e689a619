"""The last run of each benchmark as a table.

python -m bench.tables [head step kernel_report gpu] [--results FOLDER]
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.cases import RESULTS
from bench.record import read_lines

Records = list[dict[str, Any]]


def _head(records: Records) -> str:
    from bench.head.table import table

    figures = records[-1]["figures"]
    shape = figures["shape"]
    title = f"N {shape['n']}, D {shape['d']}, V {shape['v']}, {figures['dtype']}, {figures['device']}"
    absent = [f"{name} was not installed and left out: {reason}" for name, reason in figures["absent"].items()]
    return "\n\n".join(["\n".join([title, *absent]), *(table(mode, row) for mode, row in figures["modes"].items())])


def _step(records: Records) -> str:
    from bench.step import BASE, table

    figures = records[-1]["figures"]
    title = f"{figures['model']}, {figures['profile']} prompts, {figures['pairs_per_step']} pairs a step"
    return f"{title}\n{table(figures['engines'], BASE)}"


def _kernel_report(records: Records) -> str:
    lines = ["counts of the compiler and PREDICTIONS for an H100, nothing ran on a GPU"]
    for architecture, kernels in records[-1]["figures"].items():
        lines.append(f"{architecture:46}{'registers':>9}{'shared':>9}{'spills':>8}{'ms, predicted':>15}")
        for name, facts in kernels.items():
            predicted = facts.get("predicted_ms_h100")
            time = "-" if predicted is None else f"{predicted:.2f}"
            lines.append(f"  {name:44}{facts['registers']:9}{facts['shared_bytes']:9}{facts['spills']:8}{time:>15}")
    return "\n".join(lines)


def _gpu(records: Records) -> str:
    from bench.gpu.__main__ import text
    from bench.gpu.lines import last_run

    gpu = records[-1]["figures"]["gpu"]
    return f"{gpu['name']}, driver {gpu.get('driver', 'not known')}\n\n{text(last_run(records))}"


# Of the records of a benchmark, oldest first; a run on a GPU has many, of the others the last one is shown.
TABLES: dict[str, Callable[[Records], str]] = {
    "kernel_report": _kernel_report,
    "head": _head,
    "step": _step,
    "gpu": _gpu,
}


def main(arguments: list[str] | None = None) -> int:
    """Command line entry; 0, or 1 when a benchmark was named that has no record."""
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TABLES)}; all that were recorded")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the .jsonl files")
    args = parser.parse_args(arguments)
    if unknown := set(args.names) - set(TABLES):
        parser.error(f"expected names of {', '.join(TABLES)}, got {', '.join(sorted(unknown))}")
    missing = []
    for name in args.names or TABLES:
        path = args.results / f"{name}.jsonl"
        if not path.exists():
            missing += [name] * (name in args.names)
            continue
        records = read_lines(path)
        record = records[-1]
        where = f"{record['device']['cpu']}, {record['device']['cores']} cores"
        print(f"\n== {name}, {record['date']}, {where}, {record['command']}\n\n{TABLES[name](records)}")
    for name in missing:
        print(f"error: {name} has no record in {args.results}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
