"""The figure of limits.py: bars of its summary with standard errors."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.paper.limits_runs import CASES
from dpofast.report.diagnosis import DISPLACED, LENGTH_ACCURACY_GAP, LENGTH_CORRELATION
from dpofast.report.training_plot import BLUE, GREY, ORANGE, finish


def draw(png: Path, summary: Mapping[str, Any]) -> None:
    """Bars of limits.py's summary, with standard errors; orange ones are of runs whose report warns of this."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    (r, gap), (length, displaced) = figure.subplots(2, 2)
    about_length = [case for case in summary if case in CASES and CASES[case].set != "alike"]
    alike = [case for case in summary if case in CASES and CASES[case].set == "alike"]
    _bars(r, summary, about_length, "r", "length_bias")
    r.axhline(LENGTH_CORRELATION, color=GREY, linestyle=":", label="the warning's thresholds, both of them")
    r.set_title("Margin and length: Pearson's r", loc="left", fontweight="bold")
    _bars(gap, summary, about_length, "gap", "length_bias")
    gap.axhline(LENGTH_ACCURACY_GAP, color=GREY, linestyle=":")
    gap.set_title("Accuracy, chosen longer − chosen shorter", loc="left", fontweight="bold")
    _bars(length, summary, about_length, "length", "length_bias")
    length.axhline(summary["reference"]["length"][0], color=GREY, linestyle=":", label="what the reference writes")
    length.set_title("Words of what the policy writes", loc="left", fontweight="bold")
    _bars(displaced, summary, alike, "displacement", "likelihood_displacement")
    displaced.axhline(DISPLACED, color=GREY, linestyle=":", label="the warning's threshold")
    displaced.set_title("Pairs that differ in a word: chosen below the reference", loc="left", fontweight="bold")
    for axes in (r, displaced):
        axes.bar(0, 0, color=ORANGE, label="the report warns")
    for axes in (r, gap, length, displaced):
        finish(axes)
    figure.savefig(png, dpi=120)


def _bars(axes: Axes, summary: Mapping[str, Any], cases: Sequence[str], name: str, warning: str) -> None:
    means, errors = zip(*(summary[case][name] for case in cases), strict=True)
    colours = [ORANGE if warning in summary[case]["warnings"] else BLUE for case in cases]
    axes.bar(range(len(cases)), means, yerr=errors, color=colours, capsize=3, width=0.6)
    labels = [CASES[case].label.replace(", ", ",\n") for case in cases]
    axes.set_xticks(range(len(cases)), labels, fontsize=8)
