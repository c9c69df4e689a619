"""The figure of bench/paper/sentiment.py: reward against divergence, a second lexicon's reward, and diversity."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.paper.sentiment_methods import METHODS
from dpofast.report.training_plot import frame

_SIDE = {
    "second_opinion": "second lexicon (textblob), unseen in training",
    "distinct_2": "distinct bigrams / bigrams",
    "length": "tokens a completion",
}


def draw(figures: Mapping[str, Any], png: Path) -> None:
    """Write the PNG from what bench.paper.sentiment.collect returned."""
    figure = Figure(figsize=(12, 7.6), layout="constrained")
    axes = figure.subplot_mosaic([["main", name] for name in _SIDE], width_ratios=[2, 1])
    main = axes["main"]
    _draw_optimum(main, figures)
    _draw_points(main, figures, "reward")
    main.set_title("Reward against divergence from π_ref: the shape on a 2-core toy", loc="left", fontweight="bold")
    main.set_ylabel("reward on held-out prefixes (4 × vaderSentiment's compound)")
    rates = sorted({point["learning_rate"] for point in figures["points"]})
    told = f"solid: learning rate {rates[0]:g}" + (f", dashed: {rates[-1]:g}" if rates[1:] else "")
    main.set_xlabel(f"KL(π‖π_ref), nats a completion; a line is a run ({told})")
    figure.legend(*main.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    for name, label in _SIDE.items():
        _draw_points(axes[name], figures, name)
        axes[name].set_title(label, loc="left", fontsize=10)
    axes["length"].set_xlabel("KL(π‖π_ref), nats")
    for every in axes.values():
        frame(every)
    figure.savefig(png, dpi=120)


def _draw_optimum(axes: Axes, figures: Mapping[str, Any]) -> None:
    points = [point for point in figures["frontier"] if point["reliable"]]
    kl, reward, error = (
        [point[name][part] for point in points] for name, part in (("kl", 0), ("reward", 0), ("reward", 1))
    )
    low, high = ([r + sign * e for r, e in zip(reward, error, strict=True)] for sign in (-1, 1))
    axes.plot(kl, reward, color="black", linewidth=2, label="optimum π* (importance sampling from π_ref)")
    axes.fill_between(kl, low, high, color="black", alpha=0.15)
    last = points[-1]
    axes.annotate(
        f"β = {last['beta']:g}: {last['effective_samples']:.0f} effective samples; fewer beyond",
        (last["kl"][0], last["reward"][0]),
        textcoords="offset points",
        xytext=(14, -16),
        fontsize=8,
    )
    best = figures["best_of_n"]
    axes.plot(
        [row["kl_bound"] for row in best],
        [row["reward"][0] for row in best],
        "s",
        color="#6b7280",
        mfc="white",
        label="best of N = " + ", ".join(str(row["n"]) for row in best) + " (KL: upper bound)",
    )
    mean, error = figures["reference_reward"]
    axes.errorbar([0], [mean], [error], fmt="D", color="black", markersize=5, label="π_ref")


def _draw_points(axes: Axes, figures: Mapping[str, Any], name: str) -> None:
    labelled = set()
    runs: dict[tuple[Any, ...], list[Any]] = {}
    for point in figures["points"]:
        runs.setdefault((point["method"], point["strength"], point["learning_rate"]), []).append(point)
    lowest = min(rate for _, _, rate in runs)
    for (method, strength, rate), run in runs.items():
        drawn = METHODS[method]
        values, errors = zip(*(point[name] for point in run), strict=True)
        kls, kl_errors = zip(*(point["kl"] for point in run), strict=True)
        axes.errorbar(
            kls,
            values,
            errors,
            kl_errors,
            fmt="o-" if rate == lowest else "o--",
            markersize=4,
            linewidth=1,
            elinewidth=0.8,
            color=drawn.color,
            label=None if method in labelled else drawn.label,
        )
        labelled.add(method)
        if drawn.strength and name == "reward":
            text = f"{drawn.strength}={strength:g}"
            place = (kls[-1], values[-1])
            axes.annotate(text, place, textcoords="offset points", xytext=(5, -3), fontsize=8, color=drawn.color)
