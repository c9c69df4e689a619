"""Time and memory of a DPO step on prompts with an image of 600 tokens: dpofast.DPOTrainer against trl's DPOTrainer.

    python -m bench.vision                              Qwen3-VL's vocabulary of 151,936
    python -m bench.vision --profile proportions        backbone, tower and head cost as in Qwen3-VL-2B
    python -m bench.vision --profile proportions --pairs-per-image 4

A small random Qwen3-VL, drawn pictures of 640 x 960 pixels, questions of about 18 words and responses of about 60
(bench/vision_case.py). Both trainers get the same model folder, processor, dataset in TRL's vision format, order and
settings; those, and how runs alternate and are measured, are bench/step.py's. A step's time holds the processor's:
trl's collator runs it in every step for every response, dpofast once for a prompt and once more before the reference.

trl computes the reference in each step, since it refuses to compute it before training where there are images. dpofast
does, and that time is counted, spread over the steps: --epochs says how often they see the same pairs. --dpofast-live
adds a run with the reference in each step. Nothing is recorded unless all runs report the same loss within 1e-4 at
every step, and dpofast's steps ran exactly the positions of the formula and saw each image once.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.cases import RESULTS
from bench.record import command_line, write_record
from bench.step import PACKAGES, compare, figures_of, table
from bench.step_run import BASE, train
from bench.timing import load_at_start
from bench.vision_case import (
    VISION_PROFILES,
    VisionCase,
    VisionProfile,
    expected_counts,
    sequences,
    write_model,
    write_pairs,
)

ENGINES = ("dpofast", BASE, "dpofast-live", "trl-checkpointing")
SETTINGS = ("profile", "pairs_per_image", "pairs_per_step", "steps", "epochs", "rounds", "max_tokens")


def check_counts(counted: Mapping[str, float], expected: Mapping[str, float], *, models: int) -> None:
    """ValueError unless a step of dpofast ran what the formula says, `models` times."""
    for name, value in expected.items():
        if counted[name] != models * value:
            raise ValueError(
                f"a step of dpofast ran {counted[name]:g} {name}, by the formula {models * value:g}; nothing is "
                "recorded"
            )


def check_one_micro_batch(
    rows: Sequence[dict[str, Any]], profile: VisionProfile, pairs_per_step: int, max_tokens: int
) -> None:
    """ValueError unless every step fits one micro-batch of dpofast, which the formula is of."""
    steps = (rows[start : start + pairs_per_step] for start in range(0, len(rows), pairs_per_step))
    most = int(max(expected_counts(step, profile, pairs_per_step)["positions"] for step in steps))
    if most > max_tokens:
        raise ValueError(f"--max-tokens: expected at least {most}, the positions of a step, got {max_tokens}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="dpofast's step on images against trl's, on the CPU.")
    parser.add_argument("--profile", choices=list(VISION_PROFILES), default="qwen-vocab", help="model and lengths")
    parser.add_argument("--pairs-per-image", type=int, default=1, help="pairs, each with a question of its own")
    parser.add_argument("--pairs-per-step", type=int, default=4, help="pairs in a step")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps of a run, the first reported apart")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the pairs that the steps make up")
    parser.add_argument("--rounds", type=int, default=1, help="runs of every engine")
    parser.add_argument("--max-tokens", type=int, default=4096, help="of dpofast's micro-batches: a step in one")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    for engine in ENGINES[2:]:
        parser.add_argument(f"--{engine}", action="store_true", help=f"also run {engine}")
    parser.add_argument("--results", type=Path, default=RESULTS / "vision.jsonl", help="file the record is appended to")
    parser.add_argument("--count", action="store_true", help="also count head rows and GEMM work, in runs of their own")
    parser.add_argument("--child", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.steps < 2 or args.rounds < 1:
        parser.error(f"--steps must be at least 2 and --rounds at least 1, got {args.steps} and {args.rounds}")
    if args.epochs < 1 or args.steps % args.epochs:
        parser.error(f"--epochs must divide --steps, got {args.epochs} and {args.steps}")
    if args.pairs_per_image < 1 or args.pairs_per_step < 1:
        parser.error(
            "--pairs-per-image and --pairs-per-step must be at least 1, got "
            f"{args.pairs_per_image} and {args.pairs_per_step}"
        )
    return args


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make the inputs in the folder, run the engines and return the record's figures.

    Raises:
        ValueError: a check failed.
        RuntimeError: a run failed.
    """
    profile = VISION_PROFILES[args.profile]
    write_model(folder / "model", profile)
    pairs = args.steps // args.epochs * args.pairs_per_step
    write_pairs(folder / "pairs.jsonl", profile, pairs, args.pairs_per_image)
    case = VisionCase(
        model=str(folder / "model"),
        pairs_file=str(folder / "pairs.jsonl"),
        pairs_per_step=args.pairs_per_step,
        steps=args.steps,
        learning_rate=args.learning_rate,
        max_tokens=args.max_tokens,
        profile=args.profile,
    )
    rows = case.rows()
    expected = expected_counts(rows, profile, args.pairs_per_step)
    check_one_micro_batch(rows, profile, args.pairs_per_step, args.max_tokens)
    engines = [*ENGINES[:2], *(name for name in ENGINES[2:] if getattr(args, name.replace("-", "_")))]
    load = load_at_start()
    figures = compare(case, engines, args.rounds, count=args.count, module="bench.vision")
    for name, row in figures["engines"].items():
        if name.startswith("dpofast"):
            check_counts(row["step_counts"], expected, models=2 if name == "dpofast-live" else 1)
    prompt = math.prod(profile.image_tokens) + 4  # <user>, <assistant> and an image's two brackets
    lengths = [len(ids) - prompt - len(row["question"].split()) for row in rows for ids in sequences(row, profile)]
    return {
        **{name: getattr(args, name) for name in SETTINGS},
        "vocab_size": profile.vocab_size,
        "mean_tokens": {
            "image": math.prod(profile.image_tokens),
            "prompt": prompt + sum(len(row["question"].split()) for row in rows) / len(rows),
            "response": sum(lengths) / len(lengths),
        },
        "load_at_start": load,
        **figures,
    }


def counts_table(figures: Mapping[str, Any]) -> str:
    """What the steps ran, and the time of a step without the reference pass, as text."""
    heads = ("s/step alone", "reference, s", "positions", "tower calls", "images")
    lines = [f"{'':20}" + "".join(f"{head:>14}" for head in heads)]
    for engine, row in figures.items():
        counts = row["step_counts"]
        lines.append(
            f"{engine:20}{row['step_alone_s']['median']:14.2f}{row['reference_s']:14.2f}{counts['positions']:14,.0f}"
            f"{counts['tower_calls']:14.1f}{counts['images']:14.1f}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; 0 when recorded, 1 when a check or a run failed."""
    args = parse(argv)
    if args.child:
        args.out.write_text(json.dumps(train(args.child, VisionCase(**json.loads(args.case)), count=args.count)))
        return 0
    figures = figures_of(run, args)
    if figures is None:
        return 1
    print(table(figures["engines"], BASE))
    print(counts_table(figures["engines"]))
    print(f"largest difference of a loss at any step: {figures['loss_difference']:.1e}")
    command = command_line("bench.vision", argv)
    write_record(args.results, "vision", figures, command=command, packages=PACKAGES)
    print(f"recorded in {args.results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
