"""The figures of report.html, as SVG, drawn from a run's logs and from the pairs of its last evaluation."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dpofast.report.diagnosis import Run
from dpofast.report.training_plot import BLUE, GREY, HELD_OUT, ORANGE, curve, finish, of_lists

_GREEN, _PURPLE = "#059669", "#7c3aed"
_OF_SIZES = [BLUE, ORANGE, _GREEN, _PURPLE]
_STYLE: Any = {
    "font.size": 9,
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": "#4b5563",
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
    "svg.fonttype": "path",
}
# More points of a scatter plot would make the page slow; of more pairs an even selection is drawn.
_MOST_DOTS = 1500


@dataclass(frozen=True)
class Picture:
    """A figure: the section of the page it belongs to, title, caption (how to read it), and its SVG text."""

    section: str
    title: str
    caption: str
    svg: str


def pictures(run: Run) -> list[Picture]:
    """Returns all figures that the run has data for."""
    return list(_pictures(run))


def _pictures(run: Run) -> Iterator[Picture]:
    for section, title, caption, ylabel, draw in _PANELS:
        with matplotlib.rc_context(_STYLE):
            # Drawn without pyplot: no display is needed, and no state of the process is touched.
            figure = Figure(figsize=(4.6, 2.9), layout="constrained")
            axes = figure.subplots()
            draw(axes, run)
            if not (axes.lines or axes.collections or axes.patches) or not axes.has_data():
                continue
            axes.set_ylabel(ylabel)
            axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 6), useMathText=True)
            if not axes.get_xlabel():
                axes.set_xlabel("optimizer step")
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            finish(axes)
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        yield Picture(section, title, caption, text.getvalue())


def _metric(
    *curves: tuple[str, str, str], start: float | None = None, unit: bool = False
) -> Callable[[Axes, Run], None]:
    """Curves (metric, label, colour) of training as lines and of evaluations as dashed lines with dots."""

    def draw(axes: Axes, run: Run) -> None:
        for name, label, color in curves:
            curve(axes, run.history, name, f"{label} training", color=color, linewidth=1.4)
            curve(axes, run.history, f"{run.prefix}_{name}", f"{label} held-out", color=color, **HELD_OUT)
        if axes.lines:
            if start is not None and not (curves[0][0] == "loss" and of_lists(run.history)):
                axes.axhline(start, color=GREY, linewidth=1, linestyle=":")
            if unit:
                axes.set_ylim(-0.03, 1.03)

    return draw


def _accuracy(axes: Axes, run: Run) -> None:
    _metric(("rewards/accuracies", "", BLUE), start=0.5, unit=True)(axes, run)
    curve(axes, run.history, f"{run.prefix}_length/accuracy_balanced", "length-balanced", color=_GREEN, **HELD_OUT)


def _against_reference(axes: Axes, run: Run) -> None:
    if not run.with_reference:
        return
    scaled = [
        {"step": entry["step"], **{name: value / run.beta for name, value in entry.items() if "rewards/" in name}}
        for entry in run.history
        if "step" in entry
    ]
    for side, color in (("chosen", BLUE), ("rejected", ORANGE)):
        curve(axes, scaled, f"rewards/{side}", f"{side} training", color=color, linewidth=1.4)
        curve(axes, scaled, f"{run.prefix}_rewards/{side}", f"{side} held-out", color=color, **HELD_OUT)
    if axes.lines:
        axes.axhline(0, color=GREY, linewidth=1, linestyle=":")


def _length_accuracy(axes: Axes, run: Run) -> None:
    for name, label, color in (
        ("accuracy_chosen_longer", "chosen is the longer one", ORANGE),
        ("accuracy_chosen_shorter", "chosen is the shorter one", BLUE),
        ("accuracy_balanced", "mean of both (length-balanced)", _GREEN),
    ):
        curve(axes, run.history, f"{run.prefix}_length/{name}", label, color=color, **HELD_OUT)
    if axes.lines:
        axes.axhline(0.5, color=GREY, linewidth=1, linestyle=":")
        axes.set_ylim(-0.03, 1.03)


def _lengths(axes: Axes, run: Run) -> None:
    for name, color in (("chosen", BLUE), ("rejected", ORANGE), ("preferred", _GREEN)):
        label = "preferred by the model" if name == "preferred" else name
        curve(axes, run.history, f"{run.prefix}_lengths/{name}", label, color=color, **HELD_OUT)


def _scatter(axes: Axes, run: Run) -> None:
    if run.compared is None or not len(run.compared):
        return
    margins, longer = run.compared.margins, run.compared.lengths[:, 0] - run.compared.lengths[:, 1]
    drawn = np.flatnonzero(np.isfinite(margins))[:: -(-len(margins) // _MOST_DOTS)]
    margins, longer = margins[drawn], longer[drawn]
    axes.scatter(longer, margins, s=14, alpha=0.55, linewidths=0, color=BLUE)
    axes.axhline(0, color=GREY, linewidth=1, linestyle=":")
    axes.axvline(0, color=GREY, linewidth=1, linestyle=":")
    if run.length is not None and math.isfinite(run.length.margin_correlation):
        slope, offset = np.polyfit(longer, margins, 1)
        ends = np.array([longer.min(), longer.max()])
        label = f"r = {run.length.margin_correlation:+.2f}"
        axes.plot(ends, slope * ends + offset, color=ORANGE, linewidth=1.4, label=label)
    axes.set_xlabel("chosen − rejected tokens")


def _histogram(axes: Axes, run: Run) -> None:
    if run.pairs is None or not len(run.pairs):
        return
    margins = run.pairs.margins[np.isfinite(run.pairs.margins)]
    edges: Any = np.histogram_bin_edges(margins, bins=min(40, max(8, len(margins) // 4)))
    right = margins > 0
    labels = [f"right: {right.mean():.0%}", f"wrong: {1 - right.mean():.0%}"]
    axes.hist([margins[right], margins[~right]], edges, stacked=True, color=[BLUE, ORANGE], label=labels)
    axes.axvline(0, color=GREY, linewidth=1, linestyle=":")
    axes.set_xlabel("margin")


def _tau(axes: Axes, run: Run) -> None:
    """Kendall's tau of the held-out lists: how many lists have which, by the number of their responses."""
    if run.pairs is None or (lists := run.pairs.lists) is None:
        return
    known = np.isfinite(lists.kendall_tau)
    sizes = np.unique(lists.responses[known])
    groups = [sizes] if len(sizes) > len(_OF_SIZES) else [sizes[sizes == size] for size in sizes]
    parts = [lists.kendall_tau[known & np.isin(lists.responses, group)] for group in groups]
    labels = [f"K = {group[0]}" if len(group) == 1 else f"K = {group[0]} to {group[-1]}" for group in groups]
    if parts:
        edges: Any = np.linspace(-1, 1, 22)
        axes.hist(parts, edges, stacked=True, color=_OF_SIZES[: len(parts)], label=labels)
        axes.axvline(0, color=GREY, linewidth=1, linestyle=":")
        axes.set_xlabel("Kendall's τ of rewards and ranks")


def _work(axes: Axes, run: Run) -> None:
    curve(axes, run.history, "padding_avoided", "pads, of a padded batch", color=_PURPLE, linewidth=1.4)
    curve(axes, run.history, "sharing_avoided", "repeated positions, of the real tokens", color=_GREEN, linewidth=1.4)
    if axes.lines:
        axes.set_ylim(-0.03, 1.03)


_LEARNING, _REFERENCE, _LENGTH, _WORK = "Learning", "Against the reference", "Length", "Work"
_PANELS: tuple[tuple[str, str, str, str, Any], ...] = (
    (
        _LEARNING,
        "Loss",
        "Lower is better; held-out pairs decide. The dotted line is ln 2, DPO's loss of pairs before training.",
        "nats a pair",
        _metric(("loss", "", BLUE), start=math.log(2)),
    ),
    (
        _LEARNING,
        "Accuracy",
        "Share of pairs whose chosen response has the larger reward (of lists: of every two responses of different "
        "ranks). Dotted: a coin. Green: the mean over pairs whose chosen response is the longer one and over those "
        "where it is the shorter one (of lists: best against worst response).",
        "share of pairs",
        _accuracy,
    ),
    (
        _LEARNING,
        "Margin",
        "Chosen minus rejected reward, averaged over pairs.",
        "reward",
        _metric(("rewards/margins", "", BLUE), start=0.0),
    ),
    (
        _LEARNING,
        "Rewards",
        "A response's implicit reward: β times policy minus reference log-prob.",
        "reward",
        _metric(("rewards/chosen", "chosen", BLUE), ("rewards/rejected", "rejected", ORANGE), start=0.0),
    ),
    (
        _LEARNING,
        "Margins of the held-out pairs",
        "The last evaluation: everything left of the dotted line is ranked the wrong way round.",
        "pairs",
        _histogram,
    ),
    (
        _LEARNING,
        "Kendall's τ of the held-out lists",
        "The last evaluation: 1 is a list in the order of its ranks, −1 one in the opposite order; dotted: chance.",
        "lists",
        _tau,
    ),
    (
        _LEARNING,
        "Gradient norm",
        "Before clipping. Peaks that come back point to odd pairs or too high a learning rate.",
        "norm",
        _metric(("grad_norm", "", BLUE)),
    ),
    (
        _REFERENCE,
        "Log-probs against the reference",
        "Summed over the response. Both lines falling together is likelihood displacement: even chosen responses "
        "become less likely.",
        "nats a response",
        _against_reference,
    ),
    (
        _REFERENCE,
        "Displacement",
        "Share of pairs whose chosen response is less likely than under the reference.",
        "share of pairs",
        _metric(("displacement", "", BLUE), start=0.5, unit=True),
    ),
    (
        _REFERENCE,
        "Distance from the reference",
        "Policy minus reference log-prob per token of the responses in the data: a sample of the log-ratio whose mean "
        "over the model's own text is the KL divergence.",
        "nats a token",
        _metric(("kl/chosen", "chosen", BLUE), ("kl/rejected", "rejected", ORANGE), start=0.0),
    ),
    (
        _LENGTH,
        "Accuracy by length",
        "Held-out pairs. A reward that follows length is right where the chosen response is the longer one, and wrong "
        "elsewhere.",
        "share of pairs",
        _length_accuracy,
    ),
    (
        _LENGTH,
        "Response lengths",
        "Held-out pairs: mean tokens of the chosen, the rejected, and of the response that the model prefers.",
        "tokens",
        _lengths,
    ),
    (
        _LENGTH,
        "Margin and length difference",
        "One dot a held-out pair. A rising line: longer responses get larger rewards.",
        "margin",
        _scatter,
    ),
    (
        _WORK,
        "Throughput",
        "Packed positions trained on per second.",
        "tokens a second",
        _metric(("tokens_per_second", "", BLUE)),
    ),
    (
        _WORK,
        "Work avoided",
        "What a padded trainer computes and this one does not: pads, and positions of prompts that run once.",
        "share",
        _work,
    ),
    (
        _WORK,
        "Learning rate",
        "As the schedule set it.",
        "learning rate",
        _metric(("learning_rate", "", BLUE)),
    ),
)
