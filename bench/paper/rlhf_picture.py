"""The figure of rlhf.py: true reward against divergence, over-optimization of the reward model, and what each costs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from bench.paper.rlhf_runs import COLORS, LABELS
from dpofast.report.training_plot import frame

_GREY = "#6b7280"


def draw(figures: Mapping[str, Any], png: Path) -> None:
    """Write the PNG from what rlhf_figures.collect returned."""
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    reward, over, cost = figure.subplots(1, 3)
    _draw_reward(reward, figures)
    _draw_over_optimization(over, figures)
    _draw_costs(cost, figures)
    judge = figures["world"]["judge"]
    reward.set_title(f"From one set of pairs; hidden reward: a {judge}", loc="left", fontweight="bold")
    figure.savefig(png, dpi=120)


def _runs(figures: Mapping[str, Any], method: str) -> list[list[Mapping[str, Any]]]:
    runs: dict[tuple[float, float], list[Mapping[str, Any]]] = {}
    for point in figures["points"]:
        if point["method"] == method:
            runs.setdefault((point["beta"], point["learning_rate"]), []).append(point)
    return list(runs.values())


def _divergence_axis(axes: Axes) -> None:
    """Linear up to 1 nat, logarithmic beyond: a run that has collapsed may be a hundred nats away."""
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(FixedLocator((0, 0.25, 0.5, 0.75, 1, 2, 4, 8, 16, 32, 64, 128)))
    axes.xaxis.set_major_formatter(lambda nats, _: f"{nats:g}")
    axes.xaxis.set_minor_locator(NullLocator())


def _draw_reward(axes: Axes, figures: Mapping[str, Any]) -> None:
    for method in figures["costs"]:
        for number, run in enumerate(_runs(figures, method)):
            kl, kl_error, reward, error = ([p[name][i] for p in run] for name in ("kl", "reward") for i in (0, 1))
            style = {"color": COLORS[method], "marker": "o", "ms": 3, "linewidth": 1, "elinewidth": 0.7}
            axes.errorbar(kl, reward, error, kl_error, label=None if number else LABELS[method], **style)
    best = figures["best_of_n"]
    told = "best of N = " + ", ".join(str(row["n"]) for row in best) + " by the reward model (KL: upper bound)"
    kl, reward, error = [r["kl_bound"] for r in best], *([r["reward"][i] for r in best] for i in (0, 1))
    axes.errorbar(kl, reward, error, fmt="s", color=_GREY, mfc="white", ms=5, label=told)
    _divergence_axis(axes)
    axes.set_xlabel("KL(π‖π_ref), nats a completion; a line is a run")
    axes.set_ylabel("hidden true reward on held-out prefixes")
    axes.legend(frameon=False, fontsize=8)
    frame(axes)


def _draw_over_optimization(axes: Axes, figures: Mapping[str, Any]) -> None:
    for name, style, told in (("modelled_z", "--", "the reward model's"), ("true_z", "-", "hidden, true")):
        for method in [m for m in ("rlhf", "dpo") if m in figures["costs"]]:
            for number, run in enumerate(_runs(figures, method)):
                label = None if number else f"{told}: {LABELS[method]}"
                values = [p["kl"][0] for p in run], [p[name][0] for p in run]
                axes.plot(*values, style, color=COLORS[method], linewidth=1, marker="o", ms=3, label=label)
        best = figures["best_of_n"]
        values = [row["kl_bound"] for row in best], [row[name][0] for row in best]
        axes.plot(*values, style, color=_GREY, linewidth=1, marker="s", ms=3, label=f"{told}: best of N")
    _divergence_axis(axes)
    axes.set_xlabel("KL(π‖π_ref), nats a completion")
    axes.set_ylabel("standard deviations above π_ref's mean")
    axes.set_title("Over-optimization: both rewards, standardized", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    frame(axes)


def _draw_costs(axes: Axes, figures: Mapping[str, Any]) -> None:
    shades = {"labels": "#9ca3af", "reward_model": "#f59e0b"}
    told = {"labels": "sampling and labels", "reward_model": "reward model"}
    for at, (method, costs) in enumerate(figures["costs"].items()):
        left = 0.0
        for stage, (seconds, _) in costs["stages"].items():
            axes.barh(at, seconds, left=left, color=shades[stage], label=told.pop(stage, None))
            left += seconds
        seconds, _ = costs["cpu_seconds"]["steps"]
        error = costs["cpu_seconds"]["one_run"][1]
        axes.barh(at, seconds, left=left, xerr=error, color=COLORS[method], capsize=3)
    axes.set_yticks(range(len(figures["costs"])), [LABELS[method] for method in figures["costs"]])
    axes.invert_yaxis()
    axes.set_xlabel("CPU seconds of one run of all steps")
    axes.set_title("Cost, one thread, from nothing; color: the run itself", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    frame(axes)
