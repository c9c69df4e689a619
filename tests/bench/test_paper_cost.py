"""bench/paper/cost.py: where a reward is crossed, gains that every run reaches, the clock, and the quick version."""

import json
import time

import pytest

from bench.paper import cost
from bench.paper.cost_run import Clock, Size

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = Size(prefixes=4, held_out=4, looks={}, learning_rates={}, beta=0.5, seeds=(0, 1))


def point(reward, spent, kl=0.0):
    costs = {"cpu_seconds": spent, "wall_seconds": 2 * spent, "generated_tokens": 100 * spent, "kl": kl}
    return {"step": 0, "reward": reward, "second_opinion": 0.0, "distinct_2": 0.5, "length": 9.0, **costs}


def test_a_crossing_is_interpolated_and_is_the_first():
    points = [point(1.0, 10.0), point(2.0, 20.0, 4.0), point(1.5, 30.0, 6.0), point(3.0, 40.0, 8.0)]
    assert cost.crossing(points, 1.25) == {
        "cpu_seconds": 12.5,
        "wall_seconds": 25.0,
        "generated_tokens": 1250.0,
        "kl": 1.0,
    }
    assert cost.crossing(points, 2.0)["cpu_seconds"] == 20.0
    assert cost.crossing(points, 2.25)["cpu_seconds"] == 35.0


@pytest.mark.parametrize("target", [1.0, 3.5])
def test_a_reward_that_is_not_crossed_is_an_error(target):
    with pytest.raises(ValueError, match="target: expected more than the first reward and no more than the best"):
        cost.crossing([point(1.0, 0.0), point(3.0, 1.0)], target)


def test_targets_are_gains_that_every_run_reaches():
    tops = {"dpo_0": 3.0, "dpo_1": 4.0, "rl_0": 2.0, "rl_1": 5.0}
    found = {name: {"points": [point(1.0, 1.0), point(top, 2.0)], "peak_bytes": 7} for name, top in tops.items()}
    figures = cost.collect(found, SIZE)
    assert figures["gains"] == [0.25, 0.5, 0.75, 1.0]
    at = figures["methods"]["rl"]["to_gain"][-1]["cpu_seconds"]
    assert at == (pytest.approx((2.0 + 1.25) / 2), pytest.approx(0.375))
    found["rl_1"]["points"] = [point(1.0, 1.0), point(0.5, 2.0)]
    with pytest.raises(ValueError, match="a run never rose above the reference"):
        cost.collect(found, SIZE)


def test_a_paused_clock_stands_still():
    clock = Clock()
    with clock.paused():
        time.sleep(0.2)
    time.sleep(0.05)
    seconds = clock.seconds()
    assert 0.05 <= seconds["wall_seconds"] < 0.2 and seconds["cpu_seconds"] < 0.05


@pytest.mark.slow(30)
def test_the_quick_version_ends_with_figures_that_make_sense(tmp_path, capsys):
    assert cost.main(["--quick", "--work", str(tmp_path)]) == 0
    assert (tmp_path / "cost.png").stat().st_size > 10_000
    figures = json.loads((tmp_path / "paper.jsonl").read_text())["figures"]
    assert "| DPO |" in capsys.readouterr().out and figures["gains"][-1] > 0.3
    dpo, rl = (figures["methods"][method] for method in ("dpo", "rl"))
    # DPO has all its tokens before the first step, the RL loop none, and the two begin with the same policy
    assert len({entry["generated_tokens"][0] for entry in dpo["curve"]}) == 1
    assert (
        rl["curve"][0]["generated_tokens"][0]
        == rl["curve"][0]["cpu_seconds"][0]
        == 0
        < dpo["curve"][0]["cpu_seconds"][0]
    )
    assert dpo["curve"][0]["reward"] == rl["curve"][0]["reward"]
    for method in (dpo, rl):
        assert all(entry["kl"][0] > 0 for entry in method["curve"][1:]) and method["curve"][0]["kl"][0] == 0
        spent = [entry["cpu_seconds"][0] for entry in method["curve"]]
        assert spent == sorted(spent) and method["peak_bytes"][0] > 1e6
        assert all(entry["kl"][0] > 0 for entry in method["to_gain"])
