"""What the commands say about data: the preview, escaped names, and what happens to a name that is a typing error."""

import json

import pytest

from dpofast.cli.main import main
from tests.support.tiny import save_tiny

ROWS = [{"prompt": f"{i + 3} 4 5", "chosen": " 6 7", "rejected": " 8"} for i in range(4)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def write(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_preview_prints_rows_and_ends(model, tmp_path, capsys):
    data, output = write(tmp_path / "pairs.jsonl"), tmp_path / "out"
    flags = ["--max_length", "5", "--truncation_mode", "keep_end", "--output_dir", str(output)]
    assert main(["train", "--model", str(model), "--data", data, "--preview", "2", *flags]) == 0
    printed = capsys.readouterr().out
    # The tokenizer of words writes EOS, "1", as a word of its own.
    assert "line 1, tokens: prompt 2, chosen 3, rejected 2\n  prompt    4 5\n  chosen    6 7 1\n" in printed
    assert "  rejected  8 1\n\nline 2, tokens" in printed and "line 3" not in printed
    assert "2 of 2 pairs kept, prompts cut to max_length, their beginning gone: 2" in printed
    assert not output.exists()


def test_names_and_data_are_printed_escaped(model, tmp_path, capsys):
    data = write(tmp_path / "a\x1b]0;name\x07.jsonl")
    assert main(["train", "--model", str(model), "--data", data, "--preview", "1"]) == 0
    write(tmp_path / "b\x1b.jsonl", [{"chosen\x1b[2J": 1}])
    assert main(["train", "--model", str(model), "--data", str(tmp_path / "b\x1b.jsonl"), "--preview", "1"]) == 2
    printed = capsys.readouterr()
    assert "a\\x1b]0;name\\x07.jsonl: 1 of 1 pairs kept" in printed.out
    assert "b\\x1b.jsonl, line 1: column 'chosen' is missing" in printed.err and "chosen\\x1b[2J" in printed.err
    assert "\x1b" not in printed.out + printed.err


def test_a_typing_error_in_a_path_names_what_is_there(model, tmp_path, capsys, monkeypatch):
    write(tmp_path / "pairs.jsonl")
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--model", str(model), "--data", "pair.jsonl", "--preview", "1"]) == 2
    assert "pair.jsonl: no such file or folder; did you mean pairs.jsonl?" in capsys.readouterr().err
    assert main(["train", "--model", str(model), "--data", "data/pairs", "--preview", "1"]) == 2
    assert "data/pairs: no such file or folder" in capsys.readouterr().err


LISTS = [{"prompt": "3 4", "responses": [" 6", " 7", " 8"], "scores": [1, 3, 2.5]}] * 2


def test_preview_of_lists_and_of_their_pairs(model, tmp_path, capsys):
    data = write(tmp_path / "lists.jsonl", LISTS)
    command = ["train", "--model", str(model), "--data", data, "--preview", "1"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "  [1]       (rank 0, score 3) 7 1\n  [2]       (rank 1, score 2.5) 8 1\n  [0]       (rank 2, " in printed
    assert main([*command, "--list_pairs", "adjacent", "--min_score_gap", "1"]) == 0
    printed = capsys.readouterr().out
    assert (
        "line 1, tokens: prompt 2, chosen 2, rejected 2\n  prompt    3 4\n  chosen    8 1\n  rejected  6 1" in printed
    )
    assert main([*command, "--list_pairs", "best"]) == 2
    assert "list_pairs: expected one of ('all', 'best_worst', 'adjacent')" in capsys.readouterr().err
    assert main([*command, "--min_score_gap", "1"]) == 2
    assert "set list_pairs too" in capsys.readouterr().err


def test_evaluation_of_the_pairs_of_lists(model, tmp_path, capsys):
    data = write(tmp_path / "lists.jsonl", LISTS)
    command = ["eval", "--model", str(model), "--data", data, "--no_reference", "--loss_type", "simpo"]
    assert main([*command, "--list_pairs", "all", "--output", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["pairs"] == 6
    assert main([*command, "--list_pairs", "none"]) == 2
    assert "list_pairs: expected one of" in capsys.readouterr().err
