"""The figure of closed_form.py."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.paper.closed_form_fit import MARGINS
from dpofast.report.training_plot import BLUE, GREY, ORANGE, finish

_COLOURS = (ORANGE, "#ca8a04", BLUE, "#7c3aed")
_TITLE: dict[str, Any] = {"loc": "left", "fontweight": "bold", "fontsize": 10}
_KINDS = {"plain": ("plain DPO", ORANGE), "cdpo": ("cDPO", "#7c3aed"), "robust": ("robust", BLUE)}


def draw(
    png: Path,
    pairs: Sequence[int],
    large: Sequence[int],
    clean: Mapping[str, Any],
    flipped: Mapping[str, Any],
    shown: Mapping[str, Any],
    share: float,
) -> None:
    """Write the PNG.

    Args:
        png: where to.
        pairs, large: counts of pairs, without flips and with them.
        clean, flipped: closed_form.py's summaries.
        shown: points (true, implicit reward).
        share: of the labels, how many were flipped.
    """
    figure = Figure(figsize=(11, 8), layout="constrained")
    (rate, rewards), (bias, margins) = figure.subplots(2, 2)
    _rate(rate, pairs, clean)
    _rewards(rewards, shown)
    _bias(bias, large, flipped, share)
    _margins(margins, max(pairs), flipped, share)
    for axes in (rate, rewards, bias, margins):
        finish(axes)
    figure.savefig(png, dpi=120)


def _errors(axes: Axes, x: Sequence[float], values: Sequence[Sequence[float]], label: str, colour: str) -> None:
    means, errors = zip(*values, strict=True)
    axes.errorbar(x, means, errors, label=label, color=colour, marker="o", ms=4, capsize=3, linewidth=1.4)


def _rate(axes: Axes, pairs: Sequence[int], clean: Mapping[str, Any]) -> None:
    for (beta, found), colour in zip(clean.items(), _COLOURS, strict=False):
        _errors(axes, pairs, [found["pairs"][str(n)]["kl"] for n in pairs], f"β = {beta}", colour)
        predicted = [found["predicted_kl_times_pairs"] / n for n in pairs]
        axes.plot(pairs, predicted, color=colour, linestyle=":", linewidth=1.4)
    axes.plot([], [], color=GREY, linestyle=":", label="predicted, tr(F·H⁻¹)/(2n)")
    axes.set(xscale="log", yscale="log", xlabel="pairs a prompt, n", ylabel="KL(π_θ‖π*), nats")
    axes.set_title("Distance from the closed form", **_TITLE)
    axes.set_ylim(top=axes.get_ylim()[1] * 100)  # room for the legend


def _rewards(axes: Axes, shown: Mapping[str, Any]) -> None:
    for (count, points), colour in zip(shown["points"].items(), (ORANGE, BLUE), strict=True):
        axes.scatter(*zip(*points, strict=True), s=6, alpha=0.6, color=colour, label=f"{count:,} pairs a prompt")
    axes.axline((0, 0), slope=1, color=GREY, linewidth=1, linestyle=":")
    axes.set(xlabel="r*, centred for each prompt", ylabel="β·log(π_θ/π_ref), centred")
    axes.set_title(f"The implicit reward, β = {shown['beta']}", **_TITLE)


def _bias(axes: Axes, pairs: Sequence[int], flipped: Mapping[str, Any], share: float) -> None:
    for kind, (label, colour) in _KINDS.items():
        _errors(axes, pairs, [flipped[kind][str(n)]["kl"] for n in pairs], label, colour)
    axes.set(xscale="log", yscale="log", xlabel="pairs a prompt, n", ylabel="KL(π_θ‖π*), nats")
    axes.set_title(f"{share:.0%} of the labels flipped, β = 1", **_TITLE)


def _margins(axes: Axes, most: int, flipped: Mapping[str, Any], share: float) -> None:
    x = np.linspace(MARGINS[0], MARGINS[-1], 121)
    for (kind, (label, colour)), margin in zip(_KINDS.items(), flipped_margins(x, share), strict=True):
        axes.plot(x, margin, color=colour, linewidth=1.4, linestyle=":")
        means, errors = zip(*flipped[kind][str(most)]["binned_margins"], strict=True)
        axes.errorbar(MARGINS, means, errors, fmt="o", ms=4, capsize=3, color=colour, label=label)
    axes.plot([], [], color=GREY, linestyle=":", label="a policy that can do anything")
    axes.set(xlabel="true margin", ylabel="implicit margin, mean")
    axes.set_title(f"What {share:.0%} flipped labels make of a margin, n = {most:,}", **_TITLE)


def flipped_margins(margin: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where plain DPO, cDPO and robust end for a true margin, a share of the labels flipped, without limits."""
    seen = _turned(1 / (1 + np.exp(-margin)), share)
    smoothed = _turned(seen, share)
    return np.log(seen / (1 - seen)), np.log(smoothed / (1 - smoothed)), margin


def _turned(probability: np.ndarray, share: float) -> np.ndarray:
    return (1 - share) * probability + share * (1 - probability)
