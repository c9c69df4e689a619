"""bench.packing at a small size: it runs, records, and its claims that do not depend on time hold."""

import json

import pytest

from bench import packing


def test_a_small_run_is_recorded(tmp_path, capsys):
    small = ["--largest-plan", "10000", "--steps", "10", "--pairs", "256", "--rounds", "1", "--no-trl"]
    assert packing.main([*small, "--results", str(tmp_path / "packing.jsonl")]) == 0
    record = json.loads((tmp_path / "packing.jsonl").read_text())
    figures = record["figures"]
    assert [row["pairs"] for row in figures["planning"]] == [1000, 10_000]
    assert all(row["micro_batches"] == row["lower_bound"] for row in figures["planning"])
    assert all(row["missed"] == 0 for row in [*figures["steps"], *figures["ranks"]])
    assert all(row["worst_imbalance"] < 0.01 for row in figures["ranks"])
    assert all(rate > 0 for rate in figures["filling"].values())
    said = capsys.readouterr().out
    assert "fill int32" in said and "8 ranks, 256 pairs" in said


def test_bad_numbers_are_refused(capsys):
    with pytest.raises(SystemExit):
        packing.main(["--pairs", "63"])
    assert "--pairs of 64 or more" in capsys.readouterr().err
