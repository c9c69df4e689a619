"""Everything that needs a GPU, in one command without network and in eight minutes: `make gpu` runs it.

    python -m bench.gpu [--parts head rows ...]    record in bench/results/gpu.jsonl, and in the folder $OUT where set
    python -m bench.gpu --dry                      the same code on the CPU: tiny shapes, interpreted kernels, no record

Parts, the most important first:
    head       every plan of the head and every peer, against torch.mm of the same shapes; accuracy, peak memory
    step       a packed training step of a Llama against the padded one
    rows       row kernels against the device's copy bandwidth, and a sweep over their tiles
    attention  each packed backend against padded rows, and the copy of K and V
    tune       the head's backends "triton" and "fused" at every shape: what `dpofast tune` would write
    tests      the tests that need a GPU (bench/gpu/run_tests.py)
    syncs      no device path waits for the GPU
    graphs     a plan captured as a CUDA graph
    sigmoid    the preference loss, from per-token log-probs
    linear     tiles and splits of the kernel that writes E, and of its log-probs alone, against torch.mm

Before them the extension is built in place. What is missing in this environment is said, and what can run without it
runs. Each part runs in its own process with its own time limit, since an out-of-bounds access in a kernel makes the GPU
context of its process unusable; it gets the time that earlier parts left over, and never that of later ones. Each piece
of a part is recorded when it is measured: a part that fails or is killed leaves the pieces before, the other parts
still run, and the exit code is 1. A head or step that computes wrong numbers says so beside its times.
"""

import argparse
import contextlib
import datetime
import functools
import importlib
import json
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
from bench.gpu import machine, needs, run_tests
from bench.gpu.lines import END, Run, last_run, one_line
from bench.record import command_line, read_lines

# Seconds of everything, and of the build.
LIMIT_S, BUILD_S = 480.0, 60.0
# Between a part's own alarm and the end of its process: it may sit in a call that no alarm interrupts.
GRACE_S = 5.0
# Shorter than this, a part would only import.
LEAST_S = 15.0
# What would change the figures, or what is measured, where the caller's shell sets it.
UNSET = ("TRITON_INTERPRET", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "CUDA_LAUNCH_BLOCKING")


@dataclass(frozen=True)
class Part:
    """module.function(setting, left) yields its pieces, (name, figures); module.table(pieces) shows them.

    limit_s is what it gets for certain, in seconds, the start of its process included; `left` tells it what remains.
    """

    module: str
    function: str
    table: str
    limit_s: float


PARTS = {
    "head": Part("head", "run", "table", 105),
    "step": Part("step", "run", "table", 45),
    "rows": Part("kernels", "rows", "rows_table", 30),
    "attention": Part("attention", "run", "table", 40),
    "tune": Part("tune", "run", "table", 35),
    "tests": Part("run_tests", "part", "table", 90),
    "syncs": Part("paths", "syncs", "syncs_table", 20),
    "graphs": Part("paths", "graphs", "graphs_table", 15),
    "sigmoid": Part("kernels", "sigmoid", "sigmoid_table", 15),
    "linear": Part("kernels", "linear", "linear_table", 25),
}


class OutOfTime(BaseException):
    """Raised by a part's alarm. Not an Exception, because a part continues after an Exception of a peer or a tile."""


def function_of(part: Part, name: str) -> Callable[..., Any]:
    """A function of the part's module, imported where it is needed: some parts import transformers."""
    return getattr(importlib.import_module(f"bench.gpu.{part.module}"), name)


def run_here(name: str, run: Run, dry: bool, limit_s: float) -> str | None:
    """Run a part in this process, and record its pieces. Returns why it failed; an alarm ends it after limit_s."""
    end = time.monotonic() + limit_s

    def alarm(*_: Any) -> None:
        raise OutOfTime(f"took more than {limit_s:.0f} s")

    former = signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        from bench.gpu.setting import Setting

        for piece, figures in function_of(PARTS[name], PARTS[name].function)(
            Setting.make(dry), lambda: end - time.monotonic()
        ):
            run.write(name, piece, figures)
            print(f"{name}: {piece} measured", flush=True)
    except (Exception, OutOfTime) as error:
        traceback.print_exc()
        return one_line(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    return None


def run_child(name: str, run: Run, dry: bool, limit_s: float) -> dict[str, Any]:
    """Run a part in its own process, which prints to this one's output. Records and returns seconds, error, clocks."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, machine.watched(run.gpu.get("id")) as clocks:
        out = Path(folder) / "error.json"
        command = [sys.executable, "-m", "bench.gpu", "--child", name, "--run", run.to_json(), "--out", str(out)]
        command += ["--limit", str(limit_s - GRACE_S), *["--dry"] * dry]
        # Its own group: what it started ends with it.
        child = subprocess.Popen(command, env=environment(dry), cwd=needs.ROOT, start_new_session=True)
        try:
            code = child.wait(limit_s)
            error = f"its process ended with code {code}"
            if out.exists():
                error = json.loads(out.read_text())
        except subprocess.TimeoutExpired:
            error = f"killed after {limit_s:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    ended = {"seconds": time.monotonic() - begin, "error": error, "clocks": clocks}
    run.write(name, END, ended)
    return ended


def environment(dry: bool) -> dict[str, str]:
    """What the process of a part sees: no network, one choice of device, and a folder for what Triton compiles."""
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    for name in UNSET:
        variables.pop(name, None)
    if dry:
        return variables | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    if "TRITON_CACHE_DIR" not in variables and not os.access(Path.home(), os.W_OK):
        variables["TRITON_CACHE_DIR"] = str(Path(tempfile.gettempdir(), "dpofast-triton"))
    return variables


def build() -> str | None:
    """Build the extension in place, which some parts and tests import. Returns why it failed."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    print(f"{' '.join(command)}, at most {BUILD_S:.0f} s", flush=True)
    try:
        code = subprocess.run(command, cwd=needs.ROOT, timeout=BUILD_S).returncode
    except subprocess.TimeoutExpired:
        return f"took more than {BUILD_S:.0f} s"
    return f"ended with code {code}" if code else None


def part_text(name: str, pieces: dict[str, Any]) -> str:
    """A part's table and clocks; empty where it failed before it had measured what its table needs."""
    end = pieces.get(END, {"error": "its run was cut", "clocks": {}})
    try:
        table = function_of(PARTS[name], PARTS[name].table)({key: row for key, row in pieces.items() if key != END})
    except Exception:
        if end["error"] is None:
            raise
        return ""
    return f"{table}\n{machine.clocks_line(end['clocks'])}"


def text(parts: dict[str, dict[str, Any]]) -> str:
    """All tables, and one line a part at the end."""
    lines = []
    for name, pieces in parts.items():
        end = pieces.get(END, {"error": "its run was cut", "seconds": 0.0})
        lines.append(f"{name:10}{end['seconds']:6.0f} s  {'FAILED: ' + end['error'] if end['error'] else 'ok'}")
    tables = [shown for name, pieces in parts.items() if (shown := part_text(name, pieces))]
    return "\n\n".join([*tables, "\n".join(lines)])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--dry", action="store_true", help="the same code on the CPU, at toy sizes; no record")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds of everything, the build included")
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu.jsonl", help="file that lines are appended to")
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Run.from_json, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Command line entry; 0 when every part ran, 1 when one failed or something is missing, 2 without a GPU."""
    args = parse(arguments)
    if args.child:
        args.out.write_text(json.dumps(run_here(args.child, args.run, args.dry, args.limit)))
        return 0
    end = time.monotonic() + args.limit
    failed = [] if args.dry else run_tests.check()
    for line in failed:
        print(f"error: {line}", file=sys.stderr, flush=True)
    if not args.dry:
        if not needs.installed("torch") or not _sees_gpu():
            print("error: torch sees no CUDA device; python -m bench.gpu --dry tries the code here", file=sys.stderr)
            return 2
        if reason := build():
            failed.append(f"the extension: {reason}")
            print(f"error: {failed[-1]}; what needs it fails", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        # What is shown is read from here, also where nothing else can be written.
        kept = Path(folder) / "lines.jsonl"
        out = Path(os.environ["OUT"]) if os.environ.get("OUT") and not args.dry else None
        files = [kept, *[args.results] * (not args.dry), *([out / "gpu.jsonl"] if out else [])]
        run = Run(
            name=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            command=command_line("bench.gpu", arguments),
            gpu={"name": "the CPU, dry"} if args.dry else machine.described(),
            files=tuple(str(file.resolve()) for file in files),
        )
        show = functools.partial(_show, run, kept, failed)
        for at, name in enumerate(args.parts):
            later = sum(PARTS[other].limit_s for other in args.parts[at + 1 :])
            limit_s = max(end - time.monotonic() - later, 0.0)
            print(f"\n== {name}, at most {limit_s:.0f} s", flush=True)
            if limit_s < LEAST_S:
                ended = {"seconds": 0.0, "error": "no time left", "clocks": {}}
                run.write(name, END, ended)
            else:
                ended = run_child(name, run, args.dry, limit_s)
            if ended["error"]:
                failed.append(f"{name}: {ended['error']}")
            print(part_text(name, last_run(read_lines(kept))[name]), flush=True)
            if out:
                with contextlib.suppress(OSError):
                    (out / "gpu.txt").write_text(show() + "\n", encoding="utf-8")
        print(f"\n{show()}", flush=True)
    if not args.dry:
        print(f"recorded in {', '.join(map(str, files[1:]))}")
    return 1 if failed else 0


def _sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _show(run: Run, kept: Path, failed: list[str]) -> str:
    """The device, every table and what failed."""
    errors = [f"FAILED: {line}" for line in failed]
    return "\n".join([json.dumps(run.gpu), "", text(last_run(read_lines(kept))), *errors])


if __name__ == "__main__":
    sys.exit(main())
