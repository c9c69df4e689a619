"""Time and memory of the LM head, from hidden states to log-probs to gradients: dpofast, PyTorch and public peers.

    pip install -e '.[bench]' && pip install --no-deps liger-kernel==0.8.5 cut-cross-entropy==25.1.1
    python -m bench.head --n 512 --d 576 --v 49152

Every contender gets the same tensors and computes DPO's loss over the same pairs, without a reference: from per-token
log-probs where it gives them, by its own loss where it is one. Modes: `trained` (gradients to hidden states and head),
`frozen` (to hidden states only) and `forward` (none).

Contenders alternate in one process, after a first run that is not timed: it warms up, compiles, counts GEMMs and bytes
and is checked against the plain code in float32: `off by` is the largest difference of a log-prob, in nats. `x floor`
is a contender's time over that of the mode's bare products (torch.mm of h·Wᵀ, of E·W, of Eᵀ·h) measured right before
it: the median of these ratios, with p20 and p80. Bytes are the peak beyond inputs and returned gradients, counted
(bench/cost.py) and, beside that, seen: resident memory on a CPU, the allocator's on a GPU. The plain code needs about
five float32 tensors of (N, V).
"""

import argparse
import sys
from pathlib import Path

import torch

from bench.cases import RESULTS
from bench.head.compare import compare
from bench.head.peers import OURS, PEERS, build
from bench.head.problem import MODES, Problem
from bench.head.table import table
from bench.head.truth import Truth
from bench.record import command_line, write_record
from bench.timing import load_at_start

PACKAGES = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy", "dpofast")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time and memory of the head, against PyTorch and the public peers.")
    parser.add_argument("--n", type=int, default=2048, help="targets")
    parser.add_argument("--d", type=int, default=1024, help="hidden size")
    parser.add_argument("--v", type=int, default=151936, help="vocabulary")
    parser.add_argument("--pairs", type=int, default=8, help="all sequences have the same length")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="auto", help="auto: the GPU where there is one")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of every contender")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="compare with these only")
    parser.add_argument("--results", type=Path, default=RESULTS / "head.jsonl", help="file the record is appended to")
    args = parser.parse_args()
    if args.pairs < 1 or args.n < 1 or args.n % (2 * args.pairs) or args.rounds < 1:
        parser.error(
            f"expected --pairs and --rounds of at least 1 and --n a multiple of twice the pairs, "
            f"got {args.pairs}, {args.rounds} and {args.n}"
        )
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def main() -> int:
    """Command line entry; 0 when recorded, 1 when dpofast is wrong."""
    args = parse()
    device = torch.device(args.device)
    load = load_at_start()
    problem = Problem.make(args.n, args.d, args.v, args.pairs, getattr(torch, args.dtype), device)
    heads, absent = build(problem, [*OURS, *args.peers])
    truth = Truth.of(problem)
    try:
        results = {mode: compare(problem, heads, truth, mode, args.rounds) for mode in args.modes}
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    figures = {
        "shape": {"n": args.n, "d": args.d, "v": args.v, "pairs": args.pairs},
        "dtype": args.dtype,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "rounds": args.rounds,
        "load_at_start": load,
        "absent": absent,
        "modes": results,
    }
    write_record(args.results, "head", figures, command=command_line("bench.head"), packages=PACKAGES)
    print(f"\nN {args.n}, D {args.d}, V {args.v}, {args.dtype}, {figures['device']}; recorded in {args.results}")
    for name, reason in absent.items():
        print(f"{name} is not installed and left out: {reason}")
    for mode, result in results.items():
        print("\n" + table(mode, result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
