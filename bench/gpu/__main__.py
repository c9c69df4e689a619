"""Benchmarks and checks that need a GPU, in one command without network: `make gpu` runs it after the GPU tests.

    python -m bench.gpu [--parts rows head ...]    record in bench/results/gpu.jsonl, and in the folder $OUT where set
    python -m bench.gpu --dry                      the same code on the CPU: tiny shapes, interpreted kernels, no record

Parts:
    rows     row kernels against the device's copy bandwidth, and a sweep over their tiles
    head     every plan of the head and every peer, against torch.mm of the same shapes; accuracy, peak memory
    linear   the tl.dot kernel's tiles and splits against torch.mm
    sigmoid  the preference loss, from per-token log-probs
    syncs    no device path waits for the GPU
    graphs   a plan captured as a CUDA graph
    step     a packed training step of a Llama against the padded one

Each part runs in its own process with its own time limit, since an out-of-bounds access in a kernel makes the GPU
context of its process unusable. When a part fails, its exception is shown, what it measured until then is kept, the
other parts still run, and the exit code is 1. Every baseline is measured in the same process as its contenders.
"""

import argparse
import functools
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cases import RESULTS
from bench.record import command_line, write_record

PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "dpofast")
# Between a part's own alarm and the end of its process: it may sit in a call that no alarm interrupts.
GRACE_S = 20.0


@dataclass(frozen=True)
class Part:
    """module.function(setting, figures, left) fills figures; module.table(figures) shows them.

    limit_s is the most a part may take; `left` tells it how many seconds remain.
    """

    module: str
    function: str
    table: str
    limit_s: float


PARTS = {
    "rows": Part("kernels", "rows", "rows_table", 70),
    "head": Part("head", "run", "table", 130),
    "linear": Part("kernels", "linear", "linear_table", 110),
    "sigmoid": Part("kernels", "sigmoid", "sigmoid_table", 30),
    "syncs": Part("paths", "syncs", "syncs_table", 40),
    "graphs": Part("paths", "graphs", "graphs_table", 40),
    "step": Part("step", "run", "table", 80),
}


class OutOfTime(BaseException):
    """Raised by a part's alarm. Not an Exception, because a part continues after an Exception of a peer or a tile."""


def function_of(part: Part, name: str) -> Callable[..., Any]:
    """A function of the part's module, imported where it is needed: some parts import transformers."""
    return getattr(importlib.import_module(f"bench.gpu.{part.module}"), name)


def run_here(name: str, dry: bool, limit_s: float) -> dict[str, Any]:
    """Run a part in this process: its figures, and `error` where it failed. An alarm ends it after limit_s."""
    from bench.gpu.setting import Setting, one_line

    end = time.monotonic() + limit_s

    def alarm(*_: Any) -> None:
        raise OutOfTime(f"took more than {limit_s:.0f} s")

    result: dict[str, Any] = {"figures": {}, "error": None}
    former = signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    begin = time.monotonic()
    try:
        function_of(PARTS[name], PARTS[name].function)(
            Setting.make(dry), result["figures"], lambda: end - time.monotonic()
        )
    except (Exception, OutOfTime) as error:
        traceback.print_exc()
        result["error"] = one_line(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    result["seconds"] = time.monotonic() - begin
    return result


def run_child(name: str, dry: bool, limit_s: float) -> dict[str, Any]:
    """Run a part in its own process, which prints to this process's output. Returns what run_here returns."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if dry:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "part.json"
        command = [sys.executable, "-m", "bench.gpu", "--child", name, "--out", str(out), "--limit", str(limit_s)]
        begin = time.monotonic()
        try:
            code = subprocess.run([*command, *["--dry"] * dry], env=environment, timeout=limit_s + GRACE_S).returncode
        except subprocess.TimeoutExpired:
            return {"figures": {}, "error": f"killed after {limit_s + GRACE_S:.0f} s", "seconds": limit_s + GRACE_S}
        if not out.exists():
            error = f"its process ended with code {code} and no result"
            return {"figures": {}, "error": error, "seconds": time.monotonic() - begin}
        return json.loads(out.read_text())


def finite(tree: Any) -> Any:
    """The tree with NaN and infinities as strings, because a record accepts finite numbers only."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [finite(value) for value in tree]
    return str(tree) if isinstance(tree, float) and not math.isfinite(tree) else tree


def gpu() -> dict[str, Any]:
    """The device that torch uses by default."""
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "capability": list(torch.cuda.get_device_capability()),
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda or torch.version.hip,
    }


def text(results: dict[str, dict[str, Any]]) -> str:
    """All tables, and one line a part at the end."""
    blocks = []
    for name, result in results.items():
        try:
            blocks.append(function_of(PARTS[name], PARTS[name].table)(result["figures"]))
        except Exception:  # of a part that failed before it had measured all that its table needs
            if result["error"] is None:
                raise
    ends = {name: f"FAILED: {result['error']}" if result["error"] else "ok" for name, result in results.items()}
    lines = [f"{name:10}{result['seconds']:6.0f} s  {ends[name]}" for name, result in results.items()]
    return "\n\n".join([*blocks, "\n".join(lines)])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--dry", action="store_true", help="the same code on the CPU, at toy sizes; no record")
    parser.add_argument("--limit", type=float, default=330, help="seconds for all parts together")
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu.jsonl", help="file the record is appended to")
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Command line entry; 0 when every part ran, 1 when one failed, 2 without a GPU."""
    args = parse(arguments)
    if args.child:
        args.out.write_text(json.dumps(run_here(args.child, args.dry, args.limit)))
        return 0
    device: dict[str, Any] = {"name": "the CPU, dry"}
    if not args.dry:
        import torch

        if not torch.cuda.is_available():
            print("error: torch sees no CUDA device; python -m bench.gpu --dry tries the code here", file=sys.stderr)
            return 2
        device = gpu()
    end = time.monotonic() + args.limit
    results: dict[str, dict[str, Any]] = {}
    for name in args.parts:
        limit_s = min(PARTS[name].limit_s, end - time.monotonic())
        print(f"\n== {name}, at most {max(limit_s, 0):.0f} s", flush=True)
        if limit_s < 10:
            results[name] = {"figures": {}, "error": "no time left", "seconds": 0.0}
            continue
        results[name] = run_child(name, args.dry, limit_s)
    shown = f"{device['name']}\n\n{text(results)}"
    failed = [name for name, result in results.items() if result["error"]]
    if not args.dry:
        command = command_line("bench.gpu", arguments)
        record = functools.partial(write_record, args.results, "gpu", command=command, packages=PACKAGES)
        line = json.dumps(record(finite({"gpu": device, "parts": results})))
        if folder := os.environ.get("OUT"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            with Path(folder, "gpu.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")
            Path(folder, "gpu.txt").write_text(shown + "\n", encoding="utf-8")
        print(f"recorded in {args.results}")
    print("\n" + shown, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
