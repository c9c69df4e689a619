"""dpofast train, eval and score on a file of lists, end to end."""

import json

import pytest

from dpofast import DPOConfig, DPOTrainer, load_preferences
from dpofast.cli import train as train_command
from dpofast.cli.main import main

pytestmark = pytest.mark.slow(30)

ROWS = [
    {
        "id": number,
        "prompt": f"{number} 4 5",
        "responses": [f" {7 + k} 9" + " 3" * ((number + k) % 4) for k in range(2 + number % 3)],
        "ranks": [(k + number) % (2 + number % 3) + 1 for k in range(2 + number % 3)],
    }
    for number in range(10, 34)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model_dir):
    """A checkpoint that was trained on lists, and their file."""
    folder = tmp_path_factory.mktemp("lists")
    data = folder / "lists.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    code = main(
        [
            *("train", "--model", str(model_dir), "--data", str(data), "--eval_data", str(data)),
            *("--output_dir", str(folder / "out"), "--loss_type", "plackett_luce", "--learning_rate", "1e-2"),
            *("--per_device_train_batch_size", "4", "--num_train_epochs", "2", "--use_cpu", "--report_to", "none"),
            *("--logging_steps", "1"),
        ]
    )
    assert code == 0
    return folder


def test_training_logs_and_reports_how_rewards_order_the_lists(folder):
    metrics = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    assert any("rewards/kendall_tau" in entry for entry in metrics)
    assert any("eval_rewards/ndcg" in entry for entry in metrics)
    page = (folder / "out" / "report.html").read_text()
    assert "Kendall" in page and "NDCG" in page and "pair accuracy" in page
    assert "24 lists of" in (folder / "out" / "README.md").read_text()


def test_eval_prints_the_trainers_numbers(folder, model_dir, capsys, tmp_path):
    arguments = ["--model", str(folder / "out"), "--ref_model", str(model_dir), "--data", str(folder / "lists.jsonl")]
    capsys.readouterr()
    assert main(["eval", *arguments, "--output", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    trainer = DPOTrainer(
        str(folder / "out"),
        ref_model=str(model_dir),
        args=DPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, loss_type="plackett_luce"),
        eval_dataset=load_preferences(folder / "lists.jsonl"),
    )
    expected = trainer.evaluate()
    assert found["settings"]["loss_type"] == "plackett_luce" and found["data"]["lists"] == len(ROWS)
    for name, theirs in (
        ("accuracy", "rewards/accuracies"),
        ("ties", "rewards/ties"),
        ("kendall_tau", "rewards/kendall_tau"),
        ("ndcg", "rewards/ndcg"),
        ("best_of_k", "rewards/best_of_k"),
        ("margin", "rewards/margins"),
        ("loss", "loss"),
    ):
        assert found["metrics"][name]["value"] == pytest.approx(expected[f"eval_{theirs}"], abs=1e-5), name

    assert main(["eval", *arguments]) == 0
    shown = capsys.readouterr().out
    assert "kendall tau" in shown and "best of k" in shown and "lists" in shown
    assert main(["eval", *arguments, "--list_pairs", "all", "--output", "json"]) == 0
    pairs = json.loads(capsys.readouterr().out)
    count = sum(len(row["ranks"]) * (len(row["ranks"]) - 1) // 2 for row in ROWS)
    assert pairs["data"]["pairs"] == count and pairs["settings"]["loss_type"] == "sigmoid"


def test_score_adds_a_value_for_every_response(folder, model_dir, capsys):
    output = folder / "scored.jsonl"
    arguments = ["--model", str(folder / "out"), "--ref_model", str(model_dir), "--data", str(folder / "lists.jsonl")]
    assert main(["score", *arguments, "--output", str(output)]) == 0
    scored = [json.loads(line) for line in output.read_text().splitlines()]
    for row, found in zip(ROWS, scored, strict=True):
        assert {name: found[name] for name in row} == row
        for name in ("responses_logps", "ref_responses_logps", "responses_rewards", "responses_tokens"):
            assert len(found[name]) == len(row["responses"])
        best, worst = (row["ranks"].index(rank(row["ranks"])) for rank in (min, max))
        rewards = found["responses_rewards"]
        assert found["margins"] == pytest.approx(rewards[best] - rewards[worst], abs=1e-6)
        differences = [a - b for a, b in zip(found["responses_logps"], found["ref_responses_logps"], strict=True)]
        assert rewards == pytest.approx([0.1 * each for each in differences], abs=1e-5)
    parquet = folder / "scored.parquet"
    assert main(["score", *arguments, "--output", str(parquet)]) == 0
    assert load_preferences(parquet)["ref_responses_logps"][3] == scored[3]["ref_responses_logps"]
    # what it wrote is a file of lists that bring their reference
    capsys.readouterr()
    again = ["eval", "--model", str(folder / "out"), "--data", str(output), "--output", "json"]
    assert main(again) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["margin"]["value"] == pytest.approx(
        sum(found["margins"] for found in scored) / len(scored), abs=1e-5
    )


def test_lists_for_a_loss_of_pairs_are_refused_before_a_model_is_loaded(run, monkeypatch):
    monkeypatch.setattr(train_command, "load_model", lambda *_: pytest.fail("a model was loaded"))
    code, _, error, output = run(ROWS)
    assert code != 0 and not output.exists()
    assert "lists of responses" in error and "--list_pairs" in error and "plackett_luce" in error


def test_options_that_do_not_fit_lists_are_refused(folder, capsys, tmp_path):
    shared = ["--model", str(folder / "out"), "--data", str(folder / "lists.jsonl"), "--no_reference"]
    assert main(["eval", *shared]) != 0
    assert "'plackett_luce' has a reference" in capsys.readouterr().err
    assert main(["score", *shared, "--ld_alpha", "0.5", "--output", str(tmp_path / "a.jsonl")]) != 0
    assert "ld_alpha" in capsys.readouterr().err
    assert main(["eval", *shared, "--list_pairs", "some"]) != 0
    assert "list_pairs: expected one of" in capsys.readouterr().err
