"""bench.vision: its inputs, what it counts and checks, its table, and a small run of it."""

import json

import numpy as np
import pytest
import torch

from bench import vision, vision_table
from bench.vision_case import (
    VISION_PROFILES,
    VisionCase,
    Watch,
    expected_counts,
    picture,
    processor_of,
    sequences,
    write_model,
    write_pairs,
)

QUICK = VISION_PROFILES["quick"]
PLACEHOLDER = 6


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Four pairs, two on each image."""
    folder = tmp_path_factory.mktemp("vision")
    write_model(folder / "model", QUICK)
    write_pairs(folder / "pairs.jsonl", QUICK, 4, 2)
    return VisionCase(
        model=str(folder / "model"),
        pairs_file=str(folder / "pairs.jsonl"),
        pairs_per_step=4,
        steps=1,
        learning_rate=0.0,
        profile="quick",
    )


def test_the_processor_makes_the_sequences_that_are_counted(case):
    processor = case.load_processing()
    for row, of_case in zip(case.rows(), case.dataset(), strict=True):
        for side, ids in zip(("chosen", "rejected"), sequences(row, QUICK), strict=True):
            text = processor.apply_chat_template(of_case["prompt"] + of_case[side])
            found = np.array(processor(text=[text], images=[of_case["images"]])["input_ids"][0])
            assert (found == PLACEHOLDER).sum() == 12
            np.testing.assert_array_equal(found, np.where(ids < 0, PLACEHOLDER, ids))
            assert set(ids[ids < 0]) == {-1 - row["image"]}


@pytest.mark.parametrize("name", ["qwen-vocab", "32k", "proportions"])
def test_an_image_of_the_large_profiles_has_600_placeholders(name):
    profile = VISION_PROFILES[name]
    small = processor_of(QUICK)
    text = small.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])
    processed = small(text=[text], images=[[picture(0, *profile.pixels)]], return_tensors="pt")
    assert int((processed["input_ids"] == PLACEHOLDER).sum()) == 600
    assert processed["pixel_values"].shape[0] == 2400


def test_pictures_differ_by_number_alone():
    first, again, other = (np.asarray(picture(number, 96, 128)) for number in (3, 3, 4))
    assert first.shape == (96, 128, 3) and (first == again).all() and (first != other).any()


def test_pairs_of_an_image_share_it_and_ask_other_questions(case):
    rows = case.rows()
    assert [row["image"] for row in rows] == [0, 0, 1, 1]
    assert len({row["question"] for row in rows}) == 4


def test_the_formula_counts_each_image_once():
    rows = [
        {"image": 0, "question": "w9 w10", "chosen": "w11 w12", "rejected": "w13"},
        {"image": 0, "question": "w14", "chosen": "w15", "rejected": "w16 w17"},
        {"image": 1, "question": "w9 w10", "chosen": "w11", "rejected": "w12"},
    ]
    # <user> <|vision_start|>, 12 placeholders and <|vision_end|> of two images; w9 w10 and <assistant>, responses
    # without their <end>; w14 and <assistant>, responses; w9 w10 and <assistant>, responses
    positions = 2 + 2 * 13 + (3 + 2 + 1) + (2 + 1 + 2) + (3 + 1 + 1)
    assert expected_counts(rows, QUICK, 3) == {"positions": positions, "tower_calls": 1, "images": 2}
    of_steps = expected_counts(rows, QUICK, 2)
    assert of_steps == {"positions": (2 + 13 + 6 + 5 + 2 + 13 + 5) / 2, "tower_calls": 1, "images": 1}


def test_what_a_forward_runs_is_counted(case):
    model, processor = case.load_model(), case.load_processing()
    row = case.dataset()[0]
    text = processor.apply_chat_template(row["prompt"] + row["chosen"])
    processed = processor(text=[text] * 2, images=[row["images"]] * 2, return_tensors="pt")
    with torch.no_grad(), Watch(model, QUICK) as watch:
        model(**processed)
    assert watch.counts == {"positions": processed["input_ids"].numel(), "tower_calls": 1, "images": 2}
    with torch.no_grad():
        model(**processed)
    assert watch.counts["tower_calls"] == 1


def test_counts_other_than_the_formula_s_are_refused():
    expected = {"positions": 10.0, "tower_calls": 1, "images": 2.0}
    vision.check_counts({name: 2 * value for name, value in expected.items()}, expected, models=2)
    with pytest.raises(ValueError, match="ran 3 images, by the formula 2; nothing is recorded"):
        vision.check_counts({**expected, "images": 3}, expected, models=1)


def test_a_step_of_several_micro_batches_is_refused(case):
    rows = case.rows()
    positions = int(expected_counts(rows, QUICK, 4)["positions"])
    vision.check_one_micro_batch(rows, QUICK, 4, positions)
    with pytest.raises(ValueError, match=f"--max-tokens: expected at least {positions}, .* got {positions - 1}"):
        vision.check_one_micro_batch(rows, QUICK, 4, positions - 1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--steps", "1"], "--steps must be at least 2 and --rounds at least 1, got 1 and 1"),
        (["--epochs", "2"], "--epochs must divide --steps, got 2 and 5"),
        (["--pairs-per-image", "0"], "--pairs-per-image and --pairs-per-step must be at least 1, got 0 and 4"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        vision.parse(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.slow(60)
def test_a_quick_run_has_trl_s_losses_and_sees_each_image_once(tmp_path, capsys):
    arguments = ["--profile", "quick", "--steps", "3", "--pairs-per-image", "2", "--learning-rate", "1e-3"]
    arguments += ["--results", str(tmp_path / "vision.jsonl")]
    assert vision.main(arguments) == 0
    record = json.loads((tmp_path / "vision.jsonl").read_text())
    figures = record["figures"]
    assert record["command"] == " ".join(["python -m bench.vision", *arguments])
    ours, theirs = figures["engines"]["dpofast"], figures["engines"]["trl"]
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-4)
    assert ours["losses"][0] == pytest.approx(np.log(2), abs=1e-6) and abs(ours["losses"][2] - np.log(2)) > 1e-3
    # four pairs on two images: trl sees one for each of 8 responses, by policy and reference
    assert ours["step_counts"]["images"] == 2 and theirs["step_counts"]["images"] == 16
    assert ours["reference_counts"]["images"] <= 6 and "reference_counts" not in theirs
    assert ours["step_counts"]["positions"] < theirs["step_counts"]["positions"] / 4
    assert "tower calls" in capsys.readouterr().out


def test_the_table_of_the_docs_counts_the_reference_into_the_steps(tmp_path):
    assert vision_table.vision_table(tmp_path) == "No run is recorded yet."

    def row(seconds, gib, positions, images, **reference):
        counts = {"positions": positions, "images": images, "tower_calls": 1}
        return {"step_s": {"median": seconds}, "peak_bytes": gib * 2**30, "step_counts": counts, **reference}

    ours = row(1.0, 1, 3000, 4, reference_s=2.0, reference_counts={"positions": 12000, "images": 16})
    figures = {
        **{"profile": "32k", "vocab_size": 32_000, "pairs_per_image": 1, "pairs_per_step": 4, "epochs": 1, "steps": 4},
        "mean_tokens": {"image": 600, "prompt": 622.3, "response": 60.2},
        "loss_difference": 2e-6,
        "engines": {"dpofast": ours, "trl": row(8.0, 4, 11000, 16, reference_s=0.0)},
    }
    record = {
        "figures": figures,
        "device": {"cpu": "A(R) Processor", "cores": 2},
        "date": "2026-11-30T",
        "command": "c",
    }
    older = {**record, "figures": {**figures, "engines": {}}}
    (tmp_path / "vision.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (older, record)))
    caption, _, _, _, first, second, *_ = vision_table.vision_table(tmp_path).splitlines()
    assert "Prompts of 622 tokens, 600 of them an image, responses of 60, 4 pairs a step; A, 2 cores" in caption
    assert first == "| V = 32,000, 1 | **dpofast** | 1.00 | 0.50 | 8.0x | 1.0 | 25% | 6,000 | 8.0 |"
    assert second == "|  | trl | 8.00 | - | 1.0x | 4.0 | 100% | 11,000 | 16.0 |"
    summary = " ".join(vision_table.vision_summary(tmp_path).split())
    assert "8.0 to 8.0 times faster than TRL 1.16's and took 25% to 25% of its memory" in summary
