"""The tests that need a GPU, spread over processes, because compiling their kernels is most of the work.

python -m bench.gpu.run_tests --check    what `make gpu` needs and this environment lacks, a line for each package
python -m bench.gpu.run_tests            every test marked gpu; further arguments go to pytest

Test modules whose packages are not installed are left out by name, and that fails the run at its end.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.gpu import needs
from bench.gpu.needs import ROOT

if TYPE_CHECKING:
    from bench.gpu.setting import Setting

LIMIT_S = 200.0
# A process compiles on one core, and the tests of large shapes take a few GiB of the GPU.
MOST_SHARDS, BYTES_PER_SHARD = 12, 8 << 30
# Few tests of the interpreter, for a dry run of this module.
DRY = [
    "tests/kernels/test_preference.py",
    "-k",
    "no_pairs or nan_stays or contiguous or margins or policy",
]


def check() -> list[str]:
    """What is missing here for `make gpu`, a line each; empty if nothing is."""
    lines = []
    for package, users in needs.missing().items():
        lines.append(f"{sys.executable} lacks {package}, which is needed by {', '.join(users)}: pip install {package}")
    if not needs.installed("torch"):
        return lines
    import torch

    if not torch.cuda.is_available():
        lines.append(
            f"{sys.executable}: torch {torch.__version__} sees no CUDA device: it needs a CUDA build and a driver"
        )
    return lines


def shards() -> int:
    """The number of test processes that the cores and the GPU's memory allow."""
    import torch

    from bench.record import device

    cores = device()["cores"]
    memory = torch.cuda.get_device_properties(0).total_memory // BYTES_PER_SHARD
    return max(1, min(MOST_SHARDS, cores * 3 // 4, memory))


def run(arguments: list[str], count: int, limit_s: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run pytest in `count` processes; print the failing ones' output, and yield each shard when it has ended."""
    # Where a test hangs is said before its process is killed; -v says each test, also of a shard that is killed.
    options = ["-v", "-p", "no:cacheprovider", "-o", f"faulthandler_timeout={limit_s * 0.8:.0f}", "--durations=3"]
    # One compiling process a shard: torch's own pool of them would start one for every core in each.
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    end = time.monotonic() + limit_s
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, str(shard)) for shard in range(1, count + 1)]
        processes = []
        for shard, log in enumerate(logs, 1):
            command = [sys.executable, "-m", "pytest", *options, "--shard", f"{shard}/{count}", *arguments]
            # Apart, because a stack that is written to stderr would continue the line of the test that has begun.
            with log.open("w") as stdout, log.with_suffix(".stderr").open("w") as stderr:
                processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stdout, stderr=stderr))
        try:
            for shard, (process, log) in enumerate(zip(processes, logs, strict=True), 1):
                code: int | None = None
                try:
                    code = process.wait(max(0.1, end - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                said = log.read_text(errors="replace")
                if code not in (0, 5):
                    for text in (said, log.with_suffix(".stderr").read_text(errors="replace")):
                        print("\n".join(text.rstrip().splitlines()[-200:]), flush=True)
                # 5: it got none of the few tests that were selected.
                ended = {0: "ok", 5: "ok", None: f"KILLED after {limit_s:.0f} s"}.get(code, f"FAILED with code {code}")
                yield f"shard {shard}/{count}", {"ended": ended, **results_of(said)}
        finally:
            for process in processes:
                process.kill()


def results_of(said: str) -> dict[str, Any]:
    """What pytest -v said of each test: how many ended how, the failed ones, the one that had begun, the slowest."""
    lines = re.findall(r"^(\S+\.py::.*?)(?: (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b.*)?$", said, re.MULTILINE)
    return {
        "counts": dict(Counter(end.lower() for _, end in lines if end)),
        "failed": [name for name, end in lines if end in ("FAILED", "ERROR")],
        "unfinished": [name.strip() for name, end in lines if not end],
        "slowest": re.findall(r"^[\d.]+s (?:call|setup) +.+$", said, re.MULTILINE)[:3],
    }


def part(setting: "Setting", left: Callable[[], float]) -> Iterator[tuple[str, Any]]:
    """The part "tests" of bench.gpu: modules that are left out, then each shard.

    Raises:
        RuntimeError: at the end, a test failed or did not end, or a module was left out.
    """
    wrong = []
    if setting.device.type == "cuda":
        modules = needs.gpu_test_modules()
        absent = {str(path.relative_to(ROOT)): lacking for path in modules if (lacking := needs.missing_of(path))}
        if absent:
            yield "left out", absent
            wrong.append(f"left out for want of packages: {', '.join(absent)}")
        arguments = ["-m", "gpu", *(name for path in modules if (name := str(path.relative_to(ROOT))) not in absent)]
        count = shards()
    else:
        arguments, count = DRY, 2
    ran = 0
    for name, figures in run(arguments, count, left() - 3):
        yield name, figures
        ran += sum(figures["counts"].values())
        if figures["ended"] != "ok":
            wrong.append(f"{name}: {figures['ended']}")
    if wrong or not ran:
        raise RuntimeError("; ".join(wrong) or "no test ran")


def table(pieces: dict[str, Any]) -> str:
    """A line for each shard, and for each test that failed."""
    lines = [f"{name} left out: no {', '.join(absent)}" for name, absent in pieces.get("left out", {}).items()]
    for name, figures in pieces.items():
        if name == "left out":
            continue
        counts = ", ".join(f"{count} {end}" for end, count in figures["counts"].items()) or "no test"
        lines.append(f"{name}: {counts}; {figures['ended']}")
        lines += [f"  FAILED {test}" for test in figures["failed"]]
        lines += [f"  not ended: {test}" for test in figures["unfinished"]]
    return "\n".join(lines)


def main() -> int:
    """Command line entry; 0 when all tests pass, 1 when one fails, 2 when something is missing here."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.run_tests", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say what is missing")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds")
    args, further = parser.parse_known_args()
    for line in (lacks := check()):
        print(f"make gpu: {line}", file=sys.stderr)
    if lacks or args.check:
        return 2 if lacks else 0
    count = shards()
    print(f"the tests of the GPU in {count} processes, at most {args.limit:.0f} s", flush=True)
    pieces = dict(run(["-m", "gpu", *further], count, args.limit))
    print(table(pieces))
    return 0 if all(figures["ended"] == "ok" for figures in pieces.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
