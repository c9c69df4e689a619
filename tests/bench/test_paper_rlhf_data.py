"""bench/paper/rlhf_data.py and rlhf_judge.py: fewer pairs, flipped labels, and a judge that is no lexicon."""

import json

import pytest
import torch

from bench.paper import rlhf_data, rlhf_judge
from bench.paper.judge import films_apart, load_judge
from bench.paper.review_lm import made_up_reviews, split
from bench.paper.reward import SCALE
from bench.paper.rlhf_world import CLASSIFIER, LEXICON, load_world

pytestmark = pytest.mark.usefixtures("one_thread")


def test_each_condition_is_computed_once_and_by_one_of_two_processes():
    size = rlhf_data.FULL
    assert size.conditions() == [(500, 0.0), (2000, 0.0), (8000, 0.0), (2000, 0.1), (2000, 0.3)]
    names = rlhf_data.names(size)
    assert len(set(names)) == len(names) == 3 * 5 * (1 + 2 * rlhf_data.TUNING_RUNS)
    conditions = [[name.rsplit("_", 3)[1:] for name in names[part::2]] for part in (0, 1)]
    both = {tuple(c) for c in conditions[0]} & {tuple(c) for c in conditions[1]}
    assert len(both) <= 1  # of an odd number of conditions the last is shared


@pytest.mark.slow(35)
def test_the_quick_version_compares_conditions_and_goes_on(tmp_path, capsys):
    assert rlhf_data.main(["--quick", "--work", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert (tmp_path / "rlhf_data.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((tmp_path / "paper.jsonl").read_text())["figures"]
    conditions = {(c["pairs"], c["flipped"]): c for c in figures["conditions"]}
    assert list(conditions) == [(120, 0.0), (240, 0.0), (240, 0.3)]
    for found in conditions.values():
        assert set(found["rewards"]) == {"dpo", "rlhf", "best_of_n"} and 0.3 < found["accuracy"][0] < 1
        # the held-out pairs are the same, with labels that nobody flips
        assert found["judge_accuracy"] == conditions[120, 0.0]["judge_accuracy"]
    assert conditions[240, 0.0]["lost"] == {"dpo": [0, 0], "rlhf": [0, 0], "best_of_n": [0, 0]}
    assert conditions[240, 0.3]["accuracy"] != conditions[240, 0.0]["accuracy"]
    assert all(f"{decided['claim']}: {decided['verdict']}." in said for decided in figures["claims"])
    cells = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*_0.json")}
    assert rlhf_data.main(["--quick", "--work", str(tmp_path)]) == 0
    assert capsys.readouterr().out == said and {path: path.stat().st_mtime_ns for path in cells} == cells

    # Policies that were trained on other pairs than the reward model are not compared.
    path = tmp_path / "dpo_0.1_0.001_240_0.3_0.json"
    cell = json.loads(path.read_text())
    cell["figures"]["checks"] = json.loads((tmp_path / "dpo_0.1_0.001_240_0_0.json").read_text())["figures"]["checks"]
    path.write_text(json.dumps(cell))
    with pytest.raises(ValueError, match="pairs: expected the same for all methods of a seed"):
        rlhf_data.main(["--quick", "--work", str(tmp_path)])


def test_nobody_else_sees_the_judges_films():
    reviews = made_up_reviews()
    judges, others = films_apart(reviews)
    assert {r.film for r in judges}.isdisjoint(r.film for r in others) and len(judges) + len(others) == len(reviews)
    assert films_apart(reviews) == (judges, others)
    assert all(part for part in split(judges)) and all(part for part in split(others))


@pytest.mark.slow(15)
def test_the_judge_reads_more_than_words_and_is_trained_once(tmp_path):
    world = load_world(tmp_path, True, CLASSIFIER, 16)
    found = json.loads((tmp_path / "judge" / "judge.json").read_text())
    assert found["held_out_accuracy"] > found["held_out_fresh"] + 0.15 and found["held_out_accuracy"] > 0.75
    texts = ["The film is wonderful and a joy to watch.", "The film is awful and a waste of time."]
    rewards = world.judge(texts)
    assert rewards[0] > 0 > rewards[1] and float(rewards.abs().max()) < SCALE
    # not a sum over words: a word changes the reward by more in one text than in another
    by_word = [
        world.judge([f"The film is {word} and {rest}."]) for rest in ("a joy to watch", "a waste of time")
        for word in ("wonderful", "terrible")
    ]  # fmt: skip
    changes = [float(by_word[0] - by_word[1]), float(by_word[2] - by_word[3])]
    assert abs(changes[0] - changes[1]) > 0.1
    assert torch.isfinite(world.judge([""])).all()
    stored = (tmp_path / "judge" / "judge.json").stat().st_mtime_ns
    again = load_judge(tmp_path / "judge", True, films_apart(made_up_reviews())[0])
    assert torch.allclose(again(texts), rewards) and (tmp_path / "judge" / "judge.json").stat().st_mtime_ns == stored


def test_an_unknown_judge_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"judge: expected '{LEXICON}' or '{CLASSIFIER}', got 'oracle'"):
        load_world(tmp_path, True, "oracle", 4)


@pytest.mark.slow(60)
def test_the_quick_comparison_under_the_judge_ends_with_figures(tmp_path, capsys):
    assert rlhf_judge.main(["--quick", "--work", str(tmp_path)]) == 0
    assert "DPO is cheaper: " in capsys.readouterr().out
    assert (tmp_path / "rlhf_judge.png").stat().st_size > 10_000
    record = json.loads((tmp_path / "paper.jsonl").read_text())
    assert record["name"] == "paper/rlhf_judge" and record["figures"]["world"]["judge"] == CLASSIFIER
    assert record["figures"]["world"]["classifier"]["held_out_accuracy"] > 0.7
    # the judge and π_ref are there before: the policies' models are what is counted
    assert [record["figures"]["costs"][method]["models"] for method in ("dpo", "rlhf")] == [1, 3]
