"""The tests that need a GPU, spread over processes, because compiling their kernels is most of the work.

python -m bench.gpu.run_tests --check    what `make gpu` needs and this environment lacks, in one line
python -m bench.gpu.run_tests            every test marked gpu; further arguments go to pytest
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("torch", "triton", "transformers", "numpy", "pytest", "hypothesis", "setuptools")
LIMIT_S = 200.0
# A process compiles on one core, and the tests of large shapes take a few GiB of the GPU.
MOST_SHARDS, BYTES_PER_SHARD = 8, 8 << 30


def lacking() -> str:
    """What is missing to run the GPU tests in this environment, in one line; empty if nothing is."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return f"{sys.executable} lacks {', '.join(missing)}: pip install {' '.join(missing)}, or name another PYTHON"
    import torch

    if not torch.cuda.is_available():
        return f"{sys.executable}: torch {torch.__version__} sees no CUDA device: a CUDA build and a driver are needed"
    return ""


def shards() -> int:
    """The number of test processes that the cores and the GPU's memory allow."""
    import torch

    from bench.record import device

    cores = device()["cores"]
    memory = torch.cuda.get_device_properties(0).total_memory // BYTES_PER_SHARD
    return max(1, min(MOST_SHARDS, cores // 2, memory))


def run(arguments: list[str], count: int, limit_s: float) -> int:
    """Run pytest in `count` processes; print the failing ones' output and a line for each. Returns 0 if all pass."""
    # Where a test hangs is said before its process is killed.
    options = ["-q", "-p", "no:cacheprovider", "-o", f"faulthandler_timeout={limit_s * 0.8:.0f}", "--durations=3"]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, str(shard)) for shard in range(count)]
        processes = []
        for shard, log in enumerate(logs, 1):
            command = [sys.executable, "-m", "pytest", *options, "--shard", f"{shard}/{count}", *arguments]
            with log.open("w") as stream:
                processes.append(subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT))
        end = time.monotonic() + limit_s
        codes = []
        for process in processes:
            try:
                codes.append(process.wait(max(0.1, end - time.monotonic())))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                codes.append(None)
        for shard, (log, code) in enumerate(zip(logs, codes, strict=True), 1):
            said = log.read_text(errors="replace").rstrip().splitlines()
            if code != 0:
                print("\n".join(said[-200:]))
            ended = {0: "", None: f"  KILLED after {limit_s:.0f} s"}.get(code, f"  FAILED with code {code}")
            print(f"shard {shard}/{count}: {said[-1] if said else 'said nothing'}{ended}", flush=True)
    return 0 if all(code == 0 for code in codes) else 1


def main() -> int:
    """Command line entry; 0 when all tests pass, 1 when one fails, 2 when something is missing here."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.run_tests", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say what is missing")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds")
    args, further = parser.parse_known_args()
    if lack := lacking():
        print(f"make gpu: {lack}", file=sys.stderr)
        return 2
    if args.check:
        return 0
    count = shards()
    print(f"the tests of the GPU in {count} processes, at most {args.limit:.0f} s", flush=True)
    return run(["-m", "gpu", *further], count, args.limit)


if __name__ == "__main__":
    sys.exit(main())
