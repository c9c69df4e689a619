"""`dpofast tune` without a GPU: what it says, and the whole of it in Triton's interpreter."""

import pytest
import torch

from dpofast.cli import tune
from dpofast.cli.main import main
from dpofast.common.tuning.table import device_key, read_table


def test_a_dry_run_measures_both_backends_in_every_mode_and_writes_the_table(tmp_path, monkeypatch, capsys):
    path = tmp_path / "tuned.json"
    monkeypatch.setenv("DPOFAST_TUNED", str(path))
    assert main(["tune", "--dry"]) == 0
    out = capsys.readouterr().out
    entries = read_table(path)[device_key(torch.device("cpu"))]
    assert [entry.mode for entry in entries] == ["forward", "frozen", "trained"]
    assert all(entry.triton_ms > 0 and entry.fused_ms > 0 for entry in entries)
    assert str(path) in out and all(str(entry) in out for entry in entries)


def test_without_a_gpu_it_says_what_it_needs(tmp_path, capsys):
    path = tmp_path / "tuned.json"
    assert main(["tune", "--output", str(path)]) == 2
    assert (
        "dpofast tune measures on a GPU, and torch sees none: it needs a CUDA or ROCm device" in capsys.readouterr().err
    )
    assert not path.exists()


def test_a_damaged_table_is_refused_before_anything_is_measured(tmp_path, capsys):
    path = tmp_path / "tuned.json"
    path.write_text("{")
    assert main(["tune", "--dry", "--output", str(path)]) == 2
    assert "expected a table of format 1" in capsys.readouterr().err
    assert main(["tune", "--dry", "--output", str(path), "--overwrite"]) == 0
    assert read_table(path)


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tune, "measure", lambda *_: pytest.fail("measured"))
    assert main(["tune", "--dry", "--output", str(tmp_path / "file" / "tuned.json")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_what_was_measured_before_a_failure_is_kept(tmp_path, monkeypatch):
    path, measure = tmp_path / "tuned.json", tune.measure

    def until_trained(mode, *arguments):
        if mode == "trained":
            raise ValueError("the GPU is gone")
        return measure(mode, *arguments)

    monkeypatch.setattr(tune, "measure", until_trained)
    assert main(["tune", "--dry", "--overwrite", "--output", str(path)]) == 2
    (entries,) = read_table(path).values()
    assert [entry.mode for entry in entries] == ["forward", "frozen"]


def test_backends_that_disagree_write_nothing(tmp_path, monkeypatch, capsys):
    path, call = tmp_path / "tuned.json", tune._call

    def wrong(*arguments):
        return lambda: call(*arguments)() + (arguments[-1] == "fused")

    monkeypatch.setattr(tune, "_call", wrong)
    assert main(["tune", "--dry", "--output", str(path)]) == 2
    assert "gives other log-probs than 'triton'" in capsys.readouterr().err and not path.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rows", "0"], "rows: expected sizes of at least 1"),
        (["--dtype", "float32"], "dtype: expected bfloat16 or float16, got 'float32'"),
        (["--rounds", "0"], "rounds: expected a number of at least 1, got 0"),
    ],
)
def test_bad_options(flags, message, capsys):
    assert main(["tune", *flags]) == 2
    assert message in capsys.readouterr().err
