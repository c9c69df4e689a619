import re
import sys

import pytest

from bench import walk


def test_files_and_switches_are_counted_in_order():
    calls = ["training/step.py", "head.py", "head/rows.py", "head/rows.py", "training/step.py", "training/trainer.py"]
    followed = walk.Walk(calls, packages={"head": "head"})
    assert followed.files == ["training/step.py", "head.py", "head/rows.py", "training/trainer.py"]
    assert followed.switches() == {"files": 4, "packages": 2}
    assert walk.Walk(calls, packages={}).package("gemm.py") == "gemm"


def test_a_step_is_followed_through_the_packages(capsys):
    assert walk.main([]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    files = [re.fullmatch(r" *\d+ (\S+\.py)", line).group(1) for line in lines if line.endswith(".py")]
    assert {"training/trainer.py", "packing/pack.py", "model/forward.py", "head/engine/rows.py"} <= set(files)
    assert not any(file.startswith(("cli/", "demo/", "scoring/")) for file in files)
    assert last.startswith(f"{len(files)} files of ")


def test_another_checkout_than_the_imported_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", ["", *sys.path])
    with pytest.raises(ValueError, match="which is imported already, got"):
        walk.calls_of_a_step(tmp_path)
