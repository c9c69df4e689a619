"""The run of docs/real_run.md, timed: dpofast train on SmolLM2 and preference pairs from film reviews.

    python -m bench.smollm2 build/smollm2
    python -m bench.real_pairs build/reviews
    python -m bench.real_run

Runs that page's command as it stands there, and records its wall time, peak resident memory and held-out metrics
before, during and after training in bench/results/real_run.jsonl.
"""

import argparse
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

from bench.cases import RESULTS
from bench.record import write_record
from dpofast.report.progress import read_metrics

COMMAND = (
    "dpofast train --model build/smollm2 --data build/reviews/train.jsonl --eval_data build/reviews/test.jsonl "
    "--output_dir build/smollm2-dpo --per_device_train_batch_size 8 --num_train_epochs 1 --learning_rate 2e-5 "
    "--warmup_steps 4 --logging_steps 5 --eval_strategy steps --eval_steps 10 --eval_on_start --save_strategy no"
)
HELD_OUT = ("loss", "rewards/accuracies", "rewards/margins", "displacement", "kl/chosen", "kl/rejected")


def main() -> int:
    """Run, record, and return the command's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "real_run.jsonl", help="file the record goes to")
    args = parser.parse_args()
    start = time.perf_counter()
    if Path("build/smollm2-dpo").exists():
        parser.error("build/smollm2-dpo exists already: remove it first")
    program = [str(Path(sys.executable).with_name("dpofast")), *shlex.split(COMMAND)[1:]]
    code = subprocess.run(program, check=False).returncode
    if code:
        return code
    seconds = time.perf_counter() - start
    evaluations = [entry for entry in read_metrics("build/smollm2-dpo/metrics.jsonl") if "eval_loss" in entry]
    figures = {
        "wall_s": seconds,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        "held_out": [{"step": e["step"], **{name: e[f"eval_{name}"] for name in HELD_OUT}} for e in evaluations],
    }
    write_record(args.results, "real_run", figures, command=COMMAND, packages=("torch", "transformers", "dpofast"))
    print(f"{seconds:.0f} s, peak {figures['peak_rss_bytes'] / 2**30:.2f} GiB; recorded in {args.results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
