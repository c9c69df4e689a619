"""bench/paper/stability.py: when a run counts as collapsed, and the quick version as a whole."""

import json

import pytest

from bench.paper import stability
from bench.paper.stability import collapse

pytestmark = pytest.mark.usefixtures("one_thread")

START = {"reward": 1.0, "distinct_2": 0.8}


@pytest.mark.parametrize(
    ("run", "why"),
    [
        ({"reward": 2.0, "distinct_2": 0.5, "kl": 5.0}, None),
        ({"reward": 0.9, "distinct_2": 0.8, "kl": 0.1}, "reward"),
        ({"reward": 4.0, "distinct_2": 0.3, "kl": 5.0}, "repetition"),
        ({"reward": 4.0, "distinct_2": 0.8, "kl": 6.1}, "divergence"),
    ],
)
def test_a_run_has_collapsed_when_it_lost_or_repeats_or_paid_too_much(run, why):
    assert collapse(run, START, beta=0.5) == why


@pytest.mark.slow(25)
def test_the_quick_version_ends_with_figures_that_make_sense(tmp_path, capsys):
    assert stability.main(["--quick", "--work", str(tmp_path)]) == 0
    assert (tmp_path / "stability.png").stat().st_size > 10_000
    figures = json.loads((tmp_path / "paper.jsonl").read_text())["figures"]
    said = capsys.readouterr().out
    for method, label in (("dpo", "DPO"), ("rl", "RL (RLOO)")):
        assert f"| {label} | reward |" in said
        of_method = figures["methods"][method]
        assert [(run["learning_rate"], run["seed"]) for run in of_method["runs"]] == [
            (rate, seed) for rate in stability.QUICK.learning_rates[method] for seed in (0, 1)
        ]
        gentle, wild = of_method["by_rate"]
        assert gentle["reward"][0] > figures["reference"]["reward"][0] and gentle["collapsed"] == 0
        assert wild["kl"][0] > gentle["kl"][0] > 0 and wild["collapsed"] == 2
        assert of_method["collapsed"] == 0.5
        spread = of_method["spread"]
        assert spread["reward"]["best"] >= spread["reward"]["median"] >= spread["reward"]["worst"]
        assert spread["kl"]["best"] <= spread["kl"]["median"] <= spread["kl"]["worst"]

    # A cell is computed once; a seed gives its figures again.
    cell = tmp_path / "rl_0.001_1.json"
    first = json.loads(cell.read_text())["figures"]
    kept = (tmp_path / "dpo_0.03_0.json").stat().st_mtime_ns
    cell.unlink()
    assert stability.main(["--quick", "--work", str(tmp_path)]) == 0
    again = json.loads(cell.read_text())["figures"]
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    assert (tmp_path / "dpo_0.03_0.json").stat().st_mtime_ns == kept
