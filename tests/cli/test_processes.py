"""dpofast eval and score on two processes: one process's numbers, written and printed by the first alone."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.multiprocessing.spawn import ProcessExitedException

from dpofast.cli.main import main
from dpofast.scoring.score import WINDOW
from tests.support.command_cases import on_processes
from tests.support.tiny import save_tiny, tiny_model

pytestmark = pytest.mark.slow(60)
COUNT = 2 * WINDOW + 40  # the last window is on the first process, while the second one idles


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    save_tiny(folder / "base")
    other = tiny_model()
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.5)
    save_tiny(folder / "policy", other)
    rows = [{"prompt": f"{i % 80 + 3} 4 5", "chosen": f" 6 {i % 7}", "rejected": " 7 8 9"} for i in range(COUNT)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    broken = [*rows[:30], {"prompt": "3", "chosen": None, "rejected": "4"}]
    (folder / "broken.jsonl").write_text("".join(json.dumps(row) + "\n" for row in broken))
    return folder


def flags(command, folder, *more, data="pairs.jsonl"):
    models = ("--model", folder / "policy", "--ref_model", folder / "base")
    return [str(flag) for flag in (command, *models, "--data", folder / data, *more)]


def close(found, expected):
    """Whether two JSON values are equal, numbers to 1e-6."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(close(found[name], expected[name]) for name in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(close, found, expected))
    return found == pytest.approx(expected, abs=1e-6) if isinstance(expected, float) else found == expected


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_two_processes_equal_one(folder, tmp_path, capsys):
    evaluated, scored = flags("eval", folder, "--output", "json"), flags("score", folder)
    assert main(evaluated) == 0
    expected = json.loads(capsys.readouterr().out)
    assert main([*scored, "--output", str(tmp_path / "alone.jsonl")]) == 0
    alone, said = lines(tmp_path / "alone.jsonl"), capsys.readouterr().out
    fsdp = ("--fsdp", "true")
    first, second = on_processes(
        tmp_path,
        evaluated,
        [*evaluated, *fsdp],
        [*scored, "--output", tmp_path / "rows.jsonl"],
        [*scored, "--output", tmp_path / "sharded.jsonl", *fsdp],
        flags("eval", folder, data="broken.jsonl"),
    )
    assert [code for code, _, _ in first] == [code for code, _, _ in second] == [0, 0, 0, 0, 2]
    assert {(out, err) for _, out, err in second} == {("", "")}
    for (_, out, _), sharded in zip(first[:2], (False, True), strict=True):
        found = json.loads(out)
        assert found["settings"].pop("fsdp") is sharded
        settings = {name: value for name, value in expected["settings"].items() if name != "fsdp"}
        assert close(found, {**expected, "settings": settings})
    for (_, out, _), name in zip(first[2:4], ("rows.jsonl", "sharded.jsonl"), strict=True):
        assert close(lines(tmp_path / name), alone)
        assert out == said.replace("alone.jsonl", name)
    assert "line 31" in first[-1][2]


def test_a_killed_run_is_gone_on_with_by_as_many_processes_or_one(folder, tmp_path, capsys):
    scored = flags("score", folder, "--output", tmp_path / "scored.jsonl")
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        on_processes(tmp_path, scored, killed=1)
    partial = tmp_path / "scored.jsonl.partial"
    assert len(lines(partial)) == 1 + 2 * WINDOW and not (tmp_path / "scored.jsonl").exists()
    ((code, out, _),), ((_, silent, _),) = on_processes(tmp_path, scored)
    assert code == 0 and f"{2 * WINDOW} of {COUNT} pairs are scored already" in out and not silent
    assert main([*scored[:-1], str(tmp_path / "alone.jsonl")]) == 0
    assert (tmp_path / "scored.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()


def test_one_process_cannot_share_weights(folder, capsys):
    assert main(flags("eval", folder, "--fsdp")) == 2
    assert "fsdp: expected several processes, which share the model's weights, got 1" in capsys.readouterr().err
    assert main(flags("eval", folder, "--fsdp", "--load_in_4bit")) == 2
    assert "fsdp: not supported with load_in_4bit" in capsys.readouterr().err


@pytest.mark.ranks
def test_torchrun(folder, tmp_path, capsys):
    evaluated = flags("eval", folder, "--output", "json")
    assert main(evaluated) == 0
    expected = json.loads(capsys.readouterr().out)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    run = subprocess.run(
        [*torchrun, "-m", "dpofast", *evaluated, "--fsdp"], capture_output=True, text=True, env={**os.environ}
    )
    assert run.returncode == 0, run.stderr
    assert close(json.loads(run.stdout)["metrics"], expected["metrics"])
