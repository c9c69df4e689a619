"""bench/paper/limits.py: properties of the preference sets, and the warnings of a run's report."""

import json

import numpy as np
import pytest

from bench.paper import limits
from bench.paper.limits_data import CHOSEN_LONGER, FAIR, LONGER, preferences
from bench.paper.limits_runs import CASES
from bench.paper.toy_language import END, VOCABULARY, prompt_of, response, words_of


def rate(row, side):
    topic = row["prompt_ids"][0] - prompt_of(0)[0]
    return np.mean([token in words_of(topic) for token in row[side][:-1]])


@pytest.mark.parametrize(("kind", "rates", "longer"), [("fair", FAIR, 0.5), ("longer", LONGER, CHOSEN_LONGER)])
def test_chosen_responses_are_richer_and_longer_as_often_as_said(kind, rates, longer):
    rows = list(preferences(kind, 2000, seed=3))
    for side, expected in zip(("chosen_ids", "rejected_ids"), rates, strict=True):
        assert np.mean([rate(row, side) for row in rows]) == pytest.approx(expected, abs=0.02)
    lengths = np.array([[len(row["chosen_ids"]), len(row["rejected_ids"])] for row in rows])
    assert (lengths[:, 0] > lengths[:, 1]).mean() == pytest.approx(longer, abs=0.03)
    assert (lengths[:, 0] != lengths[:, 1]).all()


def test_alike_responses_differ_in_one_word():
    for row in preferences("alike", 50, seed=1):
        (place,) = np.flatnonzero(np.array(row["chosen_ids"]) != np.array(row["rejected_ids"]))
        first, second, _ = words_of(row["prompt_ids"][0] - prompt_of(0)[0])
        assert (row["chosen_ids"][place], row["rejected_ids"][place]) == (first, second)


def test_responses_are_words_and_an_end():
    tokens = response(7, np.random.default_rng(0), rate=1.0)
    assert tokens[-1] == END and set(tokens[:-1]) <= set(words_of(7)) and max(words_of(7)) < VOCABULARY


@pytest.mark.slow(50)
def test_the_quick_version_shows_the_limits_and_the_report_warns_of_exactly_them(tmp_path, capsys):
    assert limits.main(["--quick", "--work", str(tmp_path)]) == 0
    assert (tmp_path / "limits.png").stat().st_size > 10_000
    found = json.loads((tmp_path / "paper.jsonl").read_text())["figures"]["cases"]
    for case in limits.QUICK.cases:
        assert tuple(found[case]["warnings"]) == CASES[case].warned, case
    titles = {"length_bias": "The model prefers the longer", "likelihood_displacement": "became less likely"}
    for case in limits.QUICK.reported:
        page = (tmp_path / "reports" / f"{case}-0.html").read_text()
        assert [name for name, title in titles.items() if title in page] == list(CASES[case].warned)
    dpo, halved = found["dpo"], 0.5 * found["dpo"]["r"][0]
    assert dpo["r"][0] > 0.4 and dpo["gap"][0] > 0.2
    for mended in ("ld_zero", "norm"):
        assert abs(found[mended]["r"][0]) < halved and found[mended]["gap"][0] < dpo["gap"][0]
    alike, rpo = found["alike"], found["rpo"]
    assert alike["displacement"][0] > 0.5 > rpo["displacement"][0]
    assert alike["chosen"][0] < 0 < rpo["chosen"][0] and alike["accuracy"][0] > 0.95 < rpo["accuracy"][0]
    assert "likelihood_displacement (1/1)" in capsys.readouterr().out
