"""The demo's data, its rules, and a quick run of all of it with everything it leaves behind."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpofast.cli.main import main
from dpofast.demo import make_data, run, world

pytestmark = pytest.mark.slow(40)

ROOT = Path(__file__).resolve().parents[2]


def rows(part):
    text = (make_data.DATA / f"pairs_{part}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def phrases_in(pairs):
    tables = [table[name] for table in (world.OPENERS, world.CLOSERS) for name in table]
    every = {phrase for table in tables for phrase in world.phrases(*table)}
    answers = " ".join(pair[side] for pair in pairs for side in ("chosen", "rejected"))
    return {phrase for phrase in every if phrase in answers}


@pytest.mark.parametrize("name", ["text.txt", "pairs_train.jsonl", "pairs_test.jsonl"])
def test_committed_data_is_what_the_script_writes(name):
    assert (make_data.DATA / name).read_bytes() == make_data.build()[name].encode()


def test_script_writes_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(make_data, "DATA", tmp_path / "data")
    make_data.main()
    assert {path.name: path.read_bytes().decode() for path in (tmp_path / "data").iterdir()} == make_data.build()


@pytest.mark.parametrize("part", ["train", "test"])
def test_pairs_differ_in_manner_and_not_in_fact_or_length(part):
    known = world.facts()
    differences = []
    for row in rows(part):
        assert world.manner(row["chosen"]) == "kind" and world.manner(row["rejected"]) == "grumpy"
        assert known[row["prompt"]] in row["chosen"] and known[row["prompt"]] in row["rejected"]
        differences.append(make_data.length(row["chosen"]) - make_data.length(row["rejected"]))
    assert sum(differences) == 0 and set(differences) == {-1, 0, 1}


def test_held_out_pairs_share_neither_topic_nor_phrase_with_the_training_pairs():
    for category in world.CATEGORIES:
        train, test, every = (make_data.topics(category, part) for part in ("train", "test", "all"))
        assert train + test == every and len(test) == len(every) // 4 > 0
        asked = " ".join(row["prompt"] for row in rows("train") if f"the {test[0]}" in row["prompt"])
        assert not asked
    assert not {row["prompt"] for row in rows("train")} & {row["prompt"] for row in rows("test")}
    assert not phrases_in(rows("train")) & phrases_in(rows("test"))


def test_text_has_both_manners_of_all_phrases():
    documents = (make_data.DATA / "text.txt").read_text(encoding="utf-8").strip().split("\n\n")
    answers = [document.split("\nAnswer:")[1] for document in documents if "\nAnswer:" in document]
    assert {name: sum(world.manner(a) == name for a in answers) for name in ("kind", "grumpy", "mixed")} == {
        "kind": make_data.TEXT_ANSWERS // 2,
        "grumpy": make_data.TEXT_ANSWERS // 2,
        "mixed": 0,
    }


def test_manner_needs_both_ends():
    kind, grumpy = rows("train")[0]["chosen"], rows("train")[0]["rejected"]
    assert [world.manner(text) for text in (kind, grumpy)] == ["kind", "grumpy"]
    assert [world.manner(text) for text in ("", kind[:-1], kind + grumpy, "It is blue.")] == ["mixed"] * 4


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The quick demo's output folder and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, "-m", "dpofast", "demo", "--quick", "--output_dir", str(folder)]
    # A process of its own: the demo sets threads and verbosity for the whole process.
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr.lower()
    return folder, done.stdout


def test_quick_demo_starts_where_policy_equals_reference(quick):
    folder, _ = quick
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    start, first = entries[:2]
    assert start["step"] == 0 and start["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert start["eval_rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert first["step"] == 1 and first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    last = [entry for entry in entries if "eval_loss" in entry][-1]
    assert last["step"] == run.QUICK.dpo_steps and last["eval_loss"] < start["eval_loss"]


def test_quick_demo_leaves_models_that_load_and_generate(quick):
    folder, _ = quick
    weights = []
    for name in ("reference", "model"):
        model, info = AutoModelForCausalLM.from_pretrained(folder / name, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        inputs = tokenizer("Question: Where is the rake?\nAnswer:", return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert output.shape == (1, inputs["input_ids"].shape[1] + 4)
        weights.append(model.get_output_embeddings().weight)
        assert (folder / name / "model.safetensors").is_file()
    assert not weights[0].equal(weights[1])


def test_quick_demo_draws_a_picture(quick):
    folder, _ = quick
    picture = imread(folder / "training.png")
    height, width, _ = picture.shape
    assert width > height > 500 and len({tuple(pixel) for pixel in picture[::7, ::7].reshape(-1, 4).tolist()}) > 10


def test_quick_demo_tells_what_it_did_and_wrote(quick):
    folder, printed = quick
    for name in ("model", "reference", "metrics.jsonl", "training.png"):
        assert str(folder / name) in printed and (folder / name).exists()
    assert "kind answers, of 8" in printed and "dpofast train --model" in printed
    assert f"DPO: step 0/{run.QUICK.dpo_steps}  held-out: loss 0.6931" in printed
    assert not re.search(r"\{'loss'|it/s", printed), "transformers' own progress is off"


@pytest.mark.slow(120)
def test_the_whole_demo_makes_answers_kind_and_keeps_their_facts(tmp_path):
    command = [sys.executable, "-m", "dpofast", "demo", "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr

    def row(name):
        return tuple(map(int, re.search(rf"{name}, of 40 +│ (\d+) +│ (\d+)", done.stdout).groups()))

    (kind_before, kind_after), (right_before, right_after) = row("kind answers"), row("answers with the right fact")
    assert kind_before <= 24 and kind_after >= 36
    assert right_before >= 36 and right_after >= right_before - 1  # sampled answers: one more or less is chance


def test_demo_refuses_a_directory_with_something_in_it(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    assert main(["demo", "--output_dir", str(tmp_path)]) == 2
    assert f"output_dir: {tmp_path} is not empty; pass --overwrite" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
