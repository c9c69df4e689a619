"""Plot loss, accuracy, margin and rewards over steps from a metrics.jsonl, and what all figures share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpofast.report.progress import read_metrics

BLUE, ORANGE, GREY = "#2563eb", "#ea580c", "#9ca3af"
HELD_OUT: dict[str, Any] = {"linestyle": "--", "marker": "o", "ms": 4}
_MOST_POINTS = 600
# Title, y axis, the metrics with their colours, and what a model without a preference has: a dotted line.
_PANELS: tuple[tuple[str, str, tuple[tuple[str, str, str], ...], float], ...] = (
    ("Loss", "nats a pair", (("loss", "", BLUE),), math.log(2)),
    ("Accuracy", "share of pairs with margin > 0", (("rewards/accuracies", "", BLUE),), 0.5),
    ("Margin", "chosen − rejected reward", (("rewards/margins", "", BLUE),), 0.0),
    (
        "Rewards",
        "β · (policy − reference)",
        (("rewards/chosen", "chosen", BLUE), ("rewards/rejected", "rejected", ORANGE)),
        0.0,
    ),
)


def of_lists(entries: Sequence[Mapping[str, Any]]) -> bool:
    """Whether these are the logs of a run on lists, whose loss does not begin at ln 2."""
    return any("rewards/kendall_tau" in entry for entry in entries)


def plot_training(metrics: str | Path, png: str | Path) -> None:
    """Draw a run's training values as lines and its held-out values as dashed lines with dots.

    Args:
        metrics: the JSON lines file of dpofast.report.progress.JsonlCallback.
        png: the file to write.

    Raises:
        ValueError: no entry with a loss in the file.
    """
    entries = read_metrics(metrics)
    if not any("loss" in entry for entry in entries):
        raise ValueError(f"{metrics}: expected a training log with a loss to draw, got {len(entries)} logs without one")
    # A Figure of its own draws without pyplot, so no display is needed and no global state is left behind.
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    for axes, (title, label, curves, start) in zip(figure.subplots(2, 2, sharex=True).flat, _PANELS, strict=True):
        if title != "Loss" or not of_lists(entries):
            axes.axhline(start, color=GREY, linewidth=1, linestyle=":")
        for name, side, color in curves:
            curve(axes, entries, name, f"{side} training", color=color, linewidth=1.6)
            curve(axes, entries, f"eval_{name}", f"{side} held-out", color=color, **HELD_OUT)
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_ylabel(label)
        finish(axes)
    for axes in figure.axes[2:]:
        axes.set_xlabel("optimizer step")
    figure.axes[0].set_ylim(bottom=0)
    figure.axes[1].set_ylim(-0.03, 1.03)
    figure.savefig(png, dpi=120)


def curve(axes: Axes, entries: Sequence[Mapping[str, Any]], name: str, label: str, **style: Any) -> None:
    """Draw the finite values of a metric over steps, thinned out evenly to at most 600 points."""
    found = [(entry["step"], entry.get(name)) for entry in entries if "step" in entry]
    points = [(step, value) for step, value in found if isinstance(value, (int, float)) and math.isfinite(value)]
    points = points[:: -(-len(points) // _MOST_POINTS)] if points else []
    if points:
        axes.plot(*zip(*points, strict=True), label=label.strip(), **style)


def frame(axes: Axes) -> None:
    """Draw a grid, and hide the top and right edges of the frame."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def finish(axes: Axes) -> None:
    """Draw grid, frame and, where there are labels, a legend."""
    frame(axes)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
