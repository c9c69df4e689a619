"""dpofast score: correct numbers in every row, output complete or absent, and equal scores after a kill."""

import json
import os
import signal
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, load_from_disk

from dpofast.cli import score as score_command
from dpofast.cli.main import main
from dpofast.data.load import tokenize_preferences
from dpofast.scoring.score import WINDOW
from dpofast.scoring.score_file import PartialScores
from tests.support.byte_tokenizer import make_tokenizer
from tests.support.chat_templates import CHATML, plain
from tests.support.tiny import save_tiny

pytestmark = pytest.mark.slow(20)

COUNT = 2 * WINDOW + 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("score")
    save_tiny(folder / "base")
    data = ["--data", str(folder / "few.jsonl"), "--output_dir", str(folder / "adapter"), "--use_cpu"]
    rows = [
        {
            "id": f"é{i}",
            "prompt": f"{i % 80 + 3} 4 5",
            "chosen": f" 6 {i % 7}",
            "rejected": " 7 8 9",
            "extra": {"k": [i]},
        }
        for i in range(COUNT)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:30]))
    options = ["--lora_r", "4", "--report_to", "none", "--learning_rate", "1e-2", "--max_steps", "5"]
    assert main(["train", "--model", str(folder / "base"), *data, *options, "--no_html_report"]) == 0
    return folder


def score(folder, output, *flags, data="few.jsonl", model="adapter"):
    return main(
        ["score", "--model", str(folder / model), "--data", str(folder / data), "--output", str(output), *flags]
    )


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_every_row_keeps_what_it_has_and_gets_its_scores(folder, tmp_path):
    output = tmp_path / "new" / "scored.jsonl"
    assert score(folder, output, "--beta", "0.5") == 0
    rows = lines(folder / "few.jsonl")
    for row, found in zip(rows, lines(output), strict=True):
        assert {name: found[name] for name in row} == row and found["rejected_tokens"] == 4
        for side in ("chosen", "rejected"):
            reward = 0.5 * (found[f"{side}_logps"] - found[f"ref_{side}_logps"])
            assert found[f"{side}_rewards"] == pytest.approx(reward, abs=1e-6)
        assert found["margins"] == pytest.approx(found["chosen_rewards"] - found["rejected_rewards"], abs=1e-6)
    assert any(abs(found["margins"]) > 0.01 for found in lines(output))
    assert sorted(path.name for path in output.parent.iterdir()) == ["scored.jsonl"]
    assert '"é3"' in output.read_text("utf-8"), "text stays readable"


def test_its_reference_columns_are_what_training_reads(folder, tmp_path):
    scored = tmp_path / "scored.jsonl"
    assert score(folder, scored) == 0
    output = tmp_path / "out"
    options = ["--use_cpu", "--report_to", "none", "--max_steps", "1", "--no_html_report"]
    assert (
        main(["train", "--model", str(folder / "base"), "--data", str(scored), "--output_dir", str(output), *options])
        == 0
    )
    (first, *_) = lines(output / "metrics.jsonl")
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-5)


def test_parquet_in_and_out_keep_types(folder, tmp_path):
    table = pa.Table.from_pylist(lines(folder / "few.jsonl")).append_column("day", pa.array([17] * 30, pa.date32()))
    pq.write_table(table, tmp_path / "pairs.parquet")
    assert score(tmp_path, tmp_path / "scored.parquet", data="pairs.parquet", model=folder / "adapter") == 0
    found = pq.read_table(tmp_path / "scored.parquet")
    assert found.select(table.column_names).equals(table) and found.schema.field("margins").type == pa.float64()
    assert score(tmp_path, tmp_path / "scored.jsonl", data="pairs.parquet", model=folder / "adapter") == 0
    as_json = lines(tmp_path / "scored.jsonl")
    assert as_json[3]["day"] == "1970-01-18" and as_json[3]["margins"] == found["margins"][3].as_py()
    assert score(folder, tmp_path / "from-json.parquet") == 0
    assert pq.read_table(tmp_path / "from-json.parquet")["margins"].to_pylist() == [row["margins"] for row in as_json]


def test_a_saved_dataset_and_an_old_scoring(folder, tmp_path):
    rows = [
        {**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0, "margins": 9.0}
        for row in lines(folder / "few.jsonl")
    ]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    flags = ("--no_reference",)
    assert score(tmp_path, tmp_path / "scored.parquet", *flags, data="saved", model=folder / "base") == 0
    names = pq.read_schema(tmp_path / "scored.parquet").names
    assert names == [
        *load_from_disk(str(tmp_path / "saved")).column_names[:5],
        "chosen_logps",
        "rejected_logps",
        "chosen_tokens",
        "rejected_tokens",
    ]
    # the rows' own reference is used where no other is named
    assert score(tmp_path, tmp_path / "scored.jsonl", data="saved", model=folder / "base") == 0
    found = lines(tmp_path / "scored.jsonl")[0]
    assert found["ref_chosen_logps"] == -1.0 and found["margins"] != 9.0


def test_bad_rows_are_left_out_when_asked(folder, tmp_path, capsys):
    good = (folder / "few.jsonl").read_text().splitlines()[:3]
    bad = '{"prompt": "3", "chosen": " 4", "rejected": " 4"}'
    (tmp_path / "mixed.jsonl").write_text("\n".join([good[0], "{", "", good[1], bad, good[2]]) + "\n")
    output = tmp_path / "scored.jsonl"
    assert score(tmp_path, output, data="mixed.jsonl", model=folder / "adapter") == 2
    assert "mixed.jsonl, line 2" in capsys.readouterr().err and not output.exists()
    assert score(tmp_path, output, "--on_bad_row", "skip", data="mixed.jsonl", model=folder / "adapter") == 0
    assert [row["id"] for row in lines(output)] == ["é0", "é1", "é2"]
    assert "3 of 5 pairs kept" in capsys.readouterr().out


def killed(folder, output, after):
    """Score in a child that is killed, as by kill -9, when it writes this window's scores to the disk."""
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)  # the parent's threads are not in this process
        writes = 0
        sync = os.fsync

        def fsync(descriptor):
            nonlocal writes
            writes += 1
            if writes == after:
                # half of a line of the next window is on the disk
                os.write(descriptor, b'{"chosen_logps": -1.')
                os.kill(os.getpid(), signal.SIGKILL)
            sync(descriptor)

        os.fsync = fsync
        score(folder, output, data="pairs.jsonl")
        os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def test_a_killed_run_leaves_nothing_that_looks_whole_and_goes_on(folder, tmp_path, capsys):
    whole, output = tmp_path / "whole.jsonl", tmp_path / "scored.jsonl"
    assert score(folder, whole, data="pairs.jsonl") == 0
    for after in (1, 2, 1):  # windows of each run
        killed(folder, output, after)
        assert not output.exists() and (tmp_path / "scored.jsonl.partial").exists()
    capsys.readouterr()
    assert score(folder, output, data="pairs.jsonl") == 0
    assert f"going on with {output}.partial: {2 * WINDOW:,} of {COUNT:,} pairs" in capsys.readouterr().out
    assert output.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scored.jsonl", "whole.jsonl"]


def test_a_partial_file_of_another_run_is_not_gone_on_with(folder, tmp_path, capsys):
    output = tmp_path / "scored.jsonl"
    killed(folder, output, 2)
    before = (tmp_path / "scored.jsonl.partial").read_bytes()
    assert score(folder, output, "--beta", "0.3", data="pairs.jsonl") == 2
    assert "holds scores of another model, other data or other options" in capsys.readouterr().err
    assert (tmp_path / "scored.jsonl.partial").read_bytes() == before
    assert score(folder, output, "--beta", "0.3", "--overwrite", data="pairs.jsonl") == 0
    assert len(lines(output)) == COUNT


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "scored.csv"], "output: expected a file that ends in .jsonl or .parquet, got 'scored.csv'"),
        (["--output", "EXISTS"], "exists already: name another, or pass --overwrite"),
        (["--output", "FOLDER", "--overwrite"], "exists already: name a file"),
        (["--output", "DATA", "--overwrite"], "output: expected another file than --data"),
        (["--output", "x.jsonl", "--ld_alpha", "2"], "ld_alpha: expected a number in [0, 1], got 2"),
        ([], "the following arguments are required: --output"),
    ],
)
def test_refusals(folder, tmp_path, capsys, flags, message):
    data = tmp_path / "pairs.jsonl"
    data.write_text((folder / "few.jsonl").read_text())
    (tmp_path / "exists.jsonl").write_text("mine")
    (tmp_path / "folder.jsonl").mkdir()
    names = {"EXISTS": tmp_path / "exists.jsonl", "FOLDER": tmp_path / "folder.jsonl", "DATA": data}
    flags = [str(names.get(flag, flag)) for flag in flags]
    assert main(["score", "--model", str(folder / "adapter"), "--data", str(data), *flags]) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "exists.jsonl").read_text() == "mine" and len(lines(data)) == 30


def test_ld_alpha_with_weights_of_tokens_is_refused_before_scoring(folder, tmp_path, capsys, monkeypatch):
    """Of columns before models are loaded; of turns, whose weights tokenization makes, before a row is scored."""
    model, data = folder / "adapter", tmp_path / "data.jsonl"
    turns = [{"role": "assistant", "content": "6"}, {"role": "user", "content": "7"}]
    masked = [*turns, {"role": "assistant", "content": "8"}]
    prompt = [{"role": "user", "content": "3 4"}]
    rows = {
        "columns": {"prompt_ids": [3], "chosen_ids": [4, 5], "rejected_ids": [6], "chosen_weights": [1.0, 0.0]},
        "turns": {"prompt": prompt, "chosen": masked, "rejected": turns[:1]},
    }
    monkeypatch.setattr(score_command, "scored", lambda *_, **__: pytest.fail("a row is scored"))
    for name, row in rows.items():
        if name == "columns":
            monkeypatch.setattr(score_command, "prepare", lambda *_: pytest.fail("models are loaded"))
        else:
            tokens = tokenize_preferences(Dataset.from_list([row]), make_tokenizer(chat_template=plain(CHATML)))[0]
            monkeypatch.setattr(score_command, "prepare", lambda *_, tokens=tokens: SimpleNamespace(tokens=tokens))
        data.write_text(json.dumps(row) + "\n")
        flags = ["--output", str(tmp_path / "scored.jsonl"), "--ld_alpha", "0.5"]
        assert main(["score", "--model", str(model), "--data", str(data), *flags]) == 2
        assert "ld_alpha: weights tokens itself, and these rows have weights of tokens" in capsys.readouterr().err


def test_rows_that_have_no_place_in_parquet_are_refused(folder, tmp_path, capsys):
    rows = [{**row, "extra": i if i % 2 else {"k": i}} for i, row in enumerate(lines(folder / "few.jsonl"))]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "scored.parquet"
    assert score(tmp_path, output, data="pairs.jsonl", model=folder / "adapter") == 2
    assert "output: these rows have no place in a Parquet file" in capsys.readouterr().err and not output.exists()
    assert not (tmp_path / ".scored.parquet.writing").exists()


def test_a_second_run_with_the_same_output_is_refused(folder, tmp_path, capsys, monkeypatch):
    output, refused = tmp_path / "scored.jsonl", []
    real = PartialScores.resume

    def while_it_is_locked(self, *, overwrite):
        monkeypatch.undo()
        refused.append((score(folder, output), capsys.readouterr().err))
        return real(self, overwrite=overwrite)

    monkeypatch.setattr(PartialScores, "resume", while_it_is_locked)
    assert score(folder, output) == 0
    assert refused[0][0] == 2 and f"scored.jsonl: process {os.getpid()} on " in refused[0][1]
    assert [path.name for path in tmp_path.iterdir()] == ["scored.jsonl"] and len(lines(output)) == 30


def test_an_output_that_came_meanwhile_is_not_written_over(folder, tmp_path, capsys, monkeypatch):
    output, prepare = tmp_path / "scored.jsonl", score_command.prepare

    def another_run_ends(*arguments):
        output.write_text("theirs")
        return prepare(*arguments)

    monkeypatch.setattr(score_command, "prepare", another_run_ends)
    assert score(folder, output) == 2 and "exists already" in capsys.readouterr().err
    assert output.read_text() == "theirs" and [path.name for path in tmp_path.iterdir()] == ["scored.jsonl"]


def test_a_full_disk_keeps_the_scores_and_says_how_to_go_on(folder, tmp_path, capsys, monkeypatch):
    output = tmp_path / "scored.jsonl"

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(score_command, "write_scored", full)
        assert score(folder, output) == 2
    err = capsys.readouterr().err
    assert f"{output} cannot be written: No space left on device; what is scored so far is in {output}.partial" in err
    assert score(folder, output) == 0 and len(lines(output)) == 30
