"""Memory does not grow with the data: bench/memory.py at a size for tests."""

import json

import pytest

from bench import memory
from bench.cases import RandomProfile

PAIRS, LONGER = 20_000, 100_000


@pytest.mark.slow(36)
def test_a_long_file_takes_no_more_memory_than_a_short_one(monkeypatch):
    short = RandomProfile(prompt_median=30, response_median=20, vocab_size=512, hidden_size=64, layers=1)
    monkeypatch.setattr(memory, "PROFILE", short)
    figures = memory.compare(PAIRS, "ids", steps=2)
    assert [run["pairs"] for run in figures["runs"].values()] == [memory.FEW, PAIRS]
    for kind, above in figures["above_bytes"].items():
        assert above < memory.ALLOWED * PAIRS / LONGER, f"{kind}: {figures}"
    assert f"{PAIRS:,}" in memory.report(figures)


def test_other_losses_are_no_result(monkeypatch):
    def run_child(module, arguments, environment):
        return {"logged": arguments[1], "resident_bytes": 1, "anonymous_bytes": 1}

    monkeypatch.setattr(memory, "run_child", run_child)
    with pytest.raises(RuntimeError, match="gave other losses on the longer file"):
        memory.compare(memory.FEW, "text", steps=1)


@pytest.mark.parametrize(("above", "code"), [(memory.ALLOWED, 0), (memory.ALLOWED + 1, 1)])
def test_the_record_and_the_verdict(monkeypatch, tmp_path, capsys, above, code):
    run = {"pairs": 100, "file_bytes": 1, "resident_bytes": 1, "anonymous_bytes": 1, "seconds": {"load": 1.0}}
    figures = {"runs": {"few": run, "many": run}, "above_bytes": {"resident": above, "anonymous": 0}}
    monkeypatch.setattr(memory, "compare", lambda *arguments: figures | {"allowed_bytes": memory.ALLOWED})
    assert memory.main(["--results", str(tmp_path / "memory.jsonl")]) == code
    assert json.loads((tmp_path / "memory.jsonl").read_text())["figures"]["above_bytes"]["resident"] == above
    assert "allowed 300 MB" in capsys.readouterr().out
