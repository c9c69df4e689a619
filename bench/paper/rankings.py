"""Rankings: DPO on n rankings of K = 4 responses comes nearer to π* than on n pairs, and by as much as statistics says.

Claimed (arXiv 2305.18290, appendix A.3): the derivation holds for the Plackett-Luce model of rankings as it does for
Bradley-Terry's of pairs, whose K = 2 it is.

Computed: the world of closed_form.py; n rankings a prompt of responses drawn from π_ref, ranked by Plackett-Luce with
r*; dpofast.preference_loss of kind "plackett_luce" minimized over all of them at once, against
  pairs      as many pairs, with DPO's own loss;
  all_pairs  the six pairs of each of the same rankings, with DPO's own loss (what list_pairs="all" trains on).
What is left of KL(π_θ‖π*) is the sampling floor. For many rankings it must be tr(F·H⁻¹)/(2n) nats (information.py), H
the Fisher information of one ranking; the ratio of the two is what a ranking is worth in pairs.

    python -m bench.paper.rankings [--quick] [--work FOLDER]

draws rankings.png, prints a table and appends to bench/results/paper.jsonl. Quick: 1,296 responses, fewer rankings.
"""

import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import dpofast
from bench.paper.closed_form_fit import SLOPE, figures
from bench.paper.enumerable import Space, World, random_world, sample_pairs, sample_rankings
from bench.paper.experiment import SEEDS, begin, cells, mean_and_error, record
from bench.paper.information import predicted_kl
from bench.paper.text_table import plus_minus, text_table
from dpofast.report.training_plot import BLUE, GREY, ORANGE, finish

RESPONSES = 4
# kind of loss, and what it is called in the figure
METHODS = {
    "pairs": ("sigmoid", "pairs"),
    "rankings": ("plackett_luce", f"rankings of {RESPONSES}"),
    "all_pairs": ("sigmoid", "the 6 pairs of each ranking"),
}


@dataclass(frozen=True)
class Size:
    """counts: of pairs or rankings of a prompt; draws: of rankings, for the prediction."""

    space: Space
    counts: tuple[int, ...]
    betas: tuple[float, ...]
    draws: int


FULL = Size(Space(3, 8, 5), (10_000, 30_000, 100_000), (0.05, 0.2, 1.0, 5.0), 100_000)
QUICK = Size(Space(2, 6, 4), (3_000, 10_000), (1.0,), 20_000)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not there yet, draw, print and record. Returns 0."""
    args, size = begin("rankings", __doc__, argv, FULL, QUICK)
    world = random_world(size.space, seed=0)

    def compute(name: str) -> dict[str, Any]:
        return _compute(world, size, name)

    names = [f"prediction-{beta}" for beta in size.betas]
    fits = itertools.product(METHODS, size.betas, size.counts, SEEDS)
    names += ["-".join(map(str, fit)) for fit in fits]
    settings = {**asdict(size), "responses": RESPONSES, "slope": SLOPE}
    found = cells(args, settings, names, compute)
    betas = {str(beta): _summary(found, size, beta) for beta in size.betas}
    _draw(args.pictures / "rankings.png", size.counts, betas)
    print(_table(size, betas))
    seconds = sum(cell["seconds"] for cell in found.values())
    record(args, "rankings", {"settings": settings, "seeds": list(SEEDS), "betas": betas, "seconds": seconds})
    return 0


def sample(world: World, method: str, count: int, *, seed: int) -> Tensor:
    """What a method is trained on, best first: pairs (n, 2), or rankings (n, 4)."""
    if method == "pairs":
        return sample_pairs(world, count, seed=seed)
    rankings = sample_rankings(world, count, RESPONSES, seed=seed)
    if method == "rankings":
        return rankings
    return rankings[:, list(itertools.combinations(range(RESPONSES), 2))].flatten(0, 1)


def _compute(world: World, size: Size, name: str) -> dict[str, Any]:
    method, beta, *rest = name.split("-")
    if method == "prediction":
        made_of = {"pairs": 2, "rankings": RESPONSES}
        return {what: predicted_kl(world, float(beta), responses=k, draws=size.draws) for what, k in made_of.items()}
    count, seed = (int(value) for value in rest)
    loss = dpofast.PreferenceLoss(kind=METHODS[method][0], beta=float(beta))
    found = figures(world, sample(world, method, count, seed=seed), loss)
    return {name: value for name, value in found.items() if name not in ("rewards", "binned_margins")}


def _summary(found: Mapping[str, Any], size: Size, beta: float) -> dict[str, Any]:
    """(mean, standard error) over seeds of every number, for each method and count, and what statistics predicts.

    pairs_over_rankings: the ratio of the means of KL(π_θ‖π*), with its standard error; all_pairs_over_rankings: the
    mean of the ratios, since a seed's rankings are the same on both sides.
    """
    methods: dict[str, Any] = {}
    worth: dict[str, tuple[float, float]] = {}
    broken: dict[str, tuple[float, float]] = {}
    for count in size.counts:
        runs = {method: [found[f"{method}-{beta}-{count}-{seed}"] for seed in SEEDS] for method in METHODS}
        for method, of in runs.items():
            numbers = {name: mean_and_error([run[name] for run in of]) for name in of[0] if name != "seconds"}
            methods.setdefault(method, {})[str(count)] = numbers
        worth[str(count)] = _ratio(*(methods[method][str(count)]["kl"] for method in ("pairs", "rankings")))
        both = zip(runs["all_pairs"], runs["rankings"], strict=True)
        broken[str(count)] = mean_and_error([theirs["kl"] / ours["kl"] for theirs, ours in both])
    predicted = {name: value for name, value in found[f"prediction-{beta}"].items() if name != "seconds"}
    return {
        "methods": methods,
        "pairs_over_rankings": worth,
        "all_pairs_over_rankings": broken,
        "predicted_kl_times_count": predicted,
    }


def _ratio(above: tuple[float, float], below: tuple[float, float]) -> tuple[float, float]:
    """Ratio of two independent means, and its standard error to first order."""
    ratio = above[0] / below[0]
    return ratio, ratio * math.hypot(above[1] / above[0], below[1] / below[0])


_COLOURS = (ORANGE, "#ca8a04", BLUE, "#7c3aed")
_TITLE: dict[str, Any] = {"loc": "left", "fontweight": "bold", "fontsize": 10}
_LOOKS = {"pairs": "--", "rankings": "-"}


def _draw(png: Path, counts: Sequence[int], betas: Mapping[str, Any]) -> None:
    """Write the PNG: distances over counts, and what a ranking is worth in pairs."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    distance, worth = figure.subplots(1, 2)
    for (beta, found), colour in zip(betas.items(), _COLOURS, strict=False):
        for method, look in _LOOKS.items():
            _errors(distance, counts, [found["methods"][method][str(n)]["kl"] for n in counts], colour, look, None)
            predicted = found["predicted_kl_times_count"][method]
            distance.plot(counts, [predicted / n for n in counts], color=colour, linestyle=":", linewidth=1)
        distance.plot([], [], color=colour, label=f"β = {beta}")
        ratios = [found["pairs_over_rankings"][str(n)] for n in counts]
        _errors(worth, counts, ratios, colour, "-", f"β = {beta}")
        predicted = found["predicted_kl_times_count"]
        worth.axhline(predicted["pairs"] / predicted["rankings"], color=colour, linestyle=":", linewidth=1)
    for method, look in _LOOKS.items():
        distance.plot([], [], color=GREY, linestyle=look, label=METHODS[method][1])
    distance.plot([], [], color=GREY, linestyle=":", label="predicted, tr(F·H⁻¹)/(2n)")
    worth.plot([], [], color=GREY, linestyle=":", label="predicted by Fisher information")
    distance.set(xscale="log", yscale="log", xlabel="pairs or rankings a prompt, n", ylabel="KL(π_θ‖π*), nats")
    distance.set_title(f"Distance from the closed form: pairs, and rankings of {RESPONSES}", **_TITLE)
    distance.set_ylim(top=distance.get_ylim()[1] * 1000)  # room for the legend
    worth.set(xscale="log", xlabel="pairs or rankings a prompt, n", ylabel="KL of pairs / KL of rankings")
    worth.set_ylim(0, 12)
    worth.set_title("What a ranking is worth in pairs", **_TITLE)
    for axes in (distance, worth):
        finish(axes)
        axes.set_xticks(counts, [f"{count:,}" for count in counts])
        axes.minorticks_off()
    figure.savefig(png, dpi=120)


def _errors(
    axes: Axes, x: Sequence[int], values: Sequence[Sequence[float]], colour: str, look: str, label: str | None
) -> None:
    means, errors = zip(*values, strict=True)
    axes.errorbar(
        x, means, errors, color=colour, linestyle=look, label=label, marker="o", ms=4, capsize=3, linewidth=1.4
    )


def _table(size: Size, betas: Mapping[str, Any]) -> str:
    rows = []
    for beta, found in betas.items():
        predicted = found["predicted_kl_times_count"]
        for count in map(str, size.counts):
            kl = [plus_minus(found["methods"][method][count]["kl"]) for method in METHODS]
            worth = plus_minus(found["pairs_over_rankings"][count])
            broken = plus_minus(found["all_pairs_over_rankings"][count])
            factor = f"{predicted['pairs'] / predicted['rankings']:.2f}"
            rows.append([beta, f"{int(count):,}", *kl, worth, factor, broken])
    methods = [called for _, called in METHODS.values()]
    return text_table(
        f"KL(π_θ‖π*), nats; {size.space.responses:,} responses, {size.space.free_parameters} parameters a prompt",
        ["β", "n a prompt", *methods, "pairs / rankings", "predicted", "6 pairs / rankings"],
        rows,
    )


if __name__ == "__main__":
    sys.exit(main())
