"""bench/paper/experiment.py: cells are computed once, and again under other settings."""

from argparse import Namespace
from pathlib import Path

import pytest

from bench.paper.experiment import arguments, cells, mean_and_error, record


def in_folder(work: Path, *options: str) -> Namespace:
    return arguments("name", "doc", ["--work", str(work), *options])


def test_cells_are_computed_once_and_anew_under_other_settings(tmp_path: Path) -> None:
    calls: list[str] = []

    def compute(name: str) -> dict[str, float]:
        calls.append(name)
        if name == "broken":
            raise RuntimeError("stopped")
        return {"value": float(len(calls))}

    with pytest.raises(RuntimeError, match="stopped"):
        cells(in_folder(tmp_path), {"steps": 1}, ["a", "b", "broken"], compute)
    found = cells(in_folder(tmp_path), {"steps": 1}, ["a", "b", "c"], compute)
    assert calls == ["a", "b", "broken", "c"]
    assert [found[name]["value"] for name in "abc"] == [1.0, 2.0, 4.0] and found["a"]["seconds"] >= 0
    assert cells(in_folder(tmp_path), {"steps": 2}, ["a"], compute)["a"]["value"] == 5.0


def test_a_part_computes_its_share_and_ends(tmp_path: Path) -> None:
    calls: list[str] = []

    def compute(name: str) -> dict[str, float]:
        calls.append(name)
        return {"value": 1.0}

    with pytest.raises(SystemExit, match="0"):
        cells(in_folder(tmp_path, "--processes", "2", "--part", "1"), {}, "abcde", compute)
    assert calls == ["b", "d"]


def test_a_process_that_fails_is_told_of(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="1 of 2 processes failed"):  # there is no bench/paper/name.py
        cells(in_folder(tmp_path, "--processes", "2"), {}, "ab", lambda name: {"value": 1.0})
    assert "bench.paper.name" in capfd.readouterr().err
    assert (tmp_path / "a.json").exists()


def test_a_cell_without_a_finite_figure_is_refused_and_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        cells(in_folder(tmp_path), {}, ["a"], lambda name: {"value": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_a_damaged_cell_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"settings"')
    with pytest.raises(ValueError, match=r"a\.json: damaged .*delete it"):
        cells(in_folder(tmp_path), {}, ["a"], lambda name: {"value": 1.0})


def test_mean_and_its_standard_error() -> None:
    assert mean_and_error([1.0, 2.0, 3.0]) == (2.0, pytest.approx(1 / 3**0.5))
    assert mean_and_error([5.0]) == (5.0, 0.0)


def test_a_quick_run_leaves_what_is_committed_alone(tmp_path: Path) -> None:
    args = arguments("name", "doc", ["--quick", "--work", str(tmp_path / "work")])
    assert args.pictures == tmp_path / "work" and args.results == tmp_path / "work" / "paper.jsonl"
    record(args, "name", {"value": 1})
    assert '"paper/name"' in args.results.read_text()
