"""The dotted line of DPO's loss before training: for pairs, and not for lists, whose loss begins elsewhere."""

import json
import math

import pytest
from matplotlib.figure import Figure

from dpofast.report.training_plot import plot_training


@pytest.mark.parametrize("lists", [False, True])
def test_the_loss_of_lists_has_no_line_at_ln_2(tmp_path, monkeypatch, lists):
    names = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
    names += ("rewards/kendall_tau",) if lists else ()
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps({"step": step, **dict.fromkeys(names, 1.0)}) + "\n" for step in (1, 2)))
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    plot_training(log, tmp_path / "training.png")
    dotted = [line.get_ydata()[0] for line in drawn[0].axes[0].lines if line.get_linestyle() == ":"]
    assert dotted == ([] if lists else [pytest.approx(math.log(2))])
