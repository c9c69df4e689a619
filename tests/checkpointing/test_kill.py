"""Runs that are killed at any moment and resumed end as those that were left alone, to the last bit.

kill_runs.py forks each run from a process that has imported everything, one thread each.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.trainer_utils import get_last_checkpoint

from dpofast.checkpointing.folder import newest_whole, verify
from tests.support.kill_runs import CASES

pytestmark = pytest.mark.slow(60)

ROOT = Path(__file__).resolve().parents[2]
KILLED = -9


class Server:
    """A process of kill_runs.py."""

    def __init__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-m", "tests.support.kill_runs"], env=environment, **pipes)

    def run(self, case, out, **how):
        """Exit status (minus the signal that ended it) and seconds of a run."""
        self.process.stdin.write(json.dumps({"case": case, "out": str(out), **how}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["status"], answer["seconds"]

    def to_the_end(self, case, out):
        status, _ = self.run(case, out)
        assert status == 0, log_of(out)[-3000:]
        return json.loads((out / "final.json").read_text())


def log_of(out):
    return out.with_name(f"{out.name}.log").read_text()


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.process.stdin.close()
    server.process.wait(60)


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory):
    """What each case ends with when nothing happens, and how long it takes."""
    ends = {}

    def end(case):
        if case not in ends:
            out = tmp_path_factory.mktemp(case)
            ends[case] = (server.to_the_end(case, out), server.run(case, tmp_path_factory.mktemp(case))[1])
        return ends[case]

    return end


def everything_is_whole(out):
    """Under its own name lies no checkpoint that is not."""
    for folder in out.glob("checkpoint-*"):
        verify(folder)


def test_the_runs_are_worth_killing(undisturbed):
    losses = {case: [e["loss"] for e in undisturbed(case)[0]["logs"] if "loss" in e] for case in CASES}
    assert {case: len(found) for case, found in losses.items()} == {"full": 4, "lora": 6, "best": 5, "epochs": 3}
    best = undisturbed("best")[0]
    assert best["best"] == 10 and best["logs"][-1]["step"] == 16, "stopped early, and its best step is not its last"
    assert undisturbed("full")[0]["checkpoints"] == ["checkpoint-10", "checkpoint-12"]


@pytest.mark.parametrize("case", CASES)
def test_killed_at_random_moments(server, undisturbed, tmp_path, case):
    expected, seconds = undisturbed(case)
    draw = random.Random(case)
    kills = rounds = 0
    while kills < 5:
        out = tmp_path / str(rounds)
        rounds += 1
        while kills < 5 and not (out / "final.json").exists():
            status, _ = server.run(case, out, delay=draw.uniform(0.2, 1.1) * seconds)
            assert status in (KILLED, 0), log_of(out)[-3000:]
            kills += status == KILLED
            everything_is_whole(out)
        end = json.loads((out / "final.json").read_text()) if (out / "final.json").exists() else None
        assert (end or server.to_the_end(case, out)) == expected


@pytest.mark.parametrize(
    ("case", "kill"),
    [
        ("full", ["step", 4]),  # gradients are there, and no step is taken
        ("full", ["weights", 2]),
        ("full", ["pickle", 1]),
        ("lora", ["pickle", 7]),
        ("full", ["fsync", 9]),
        ("full", ["fsync", 16]),
        ("epochs", ["fsync", 17]),
        ("full", ["rename", 2]),
        ("full", ["renamed", 2]),
        ("epochs", ["renamed", 2]),  # at an epoch's end
        ("full", ["delete", 2]),
        ("best", ["delete", 2]),
        ("best", ["evaluation", 6]),
        ("best", ["renamed", 8]),
        ("epochs", ["evaluation", 2]),
    ],
    ids=str,
)
def test_killed_where_it_hurts_most(server, undisturbed, tmp_path, case, kill):
    status, _ = server.run(case, tmp_path, kill=kill)
    assert status == KILLED, "it never came to that point"
    everything_is_whole(tmp_path)
    assert server.to_the_end(case, tmp_path) == undisturbed(case)[0]
    assert not list(tmp_path.glob(".tmp-*")), "what the killed run left is gone"


def test_killed_after_its_last_checkpoint_and_while_it_resumes(server, undisturbed, tmp_path):
    # Early stopping: the sixteenth step's is the eighth checkpoint, and a rename deletes another after it.
    assert server.run("best", tmp_path, kill=["renamed", 14])[0] == KILLED
    assert server.run("best", tmp_path, kill=["resume", 1])[0] == KILLED
    assert server.to_the_end("best", tmp_path) == undisturbed("best")[0]


@pytest.mark.parametrize(("case", "step"), [("full", 3), ("full", 4), ("lora", 5), ("epochs", 8)])
@pytest.mark.parametrize("name", ["TERM", "INT"])
def test_a_signal_ends_the_step_with_a_checkpoint(server, undisturbed, tmp_path, case, step, name):
    status, _ = server.run(case, tmp_path, signal=[name, step])
    assert status == 1
    folder = tmp_path / f"checkpoint-{step}"
    total = {"full": 12, "lora": 12, "epochs": 12}[case]
    assert (tmp_path / "stopped.txt").read_text() == (
        f"TrainingInterrupted: stopped by SIG{name} after step {step} of {total}; "
        f"go on with resume_from_checkpoint='{folder}' (or 'latest')"
    )
    assert get_last_checkpoint(tmp_path) == str(folder)
    end = server.to_the_end(case, tmp_path)
    # Signals write checkpoints at other steps, so another one than the last may be left.
    assert {**end, "checkpoints": None} == {**undisturbed(case)[0], "checkpoints": None}


@pytest.mark.parametrize(("name", "status"), [("TERM", -15), ("INT", 1)])
def test_a_second_signal_stops_at_once(server, tmp_path, name, status):
    assert server.run("full", tmp_path, signal=[name, 4, 2])[0] == status
    assert newest_whole(tmp_path)[0].name == "checkpoint-2"
    assert not (tmp_path / "stopped.txt").exists()


def test_a_full_disk_for_a_while_loses_nothing(server, undisturbed, tmp_path):
    out = tmp_path / "out"
    status, _ = server.run("full", out, full_disk=[3, 9])
    assert status == 0
    assert json.loads((out / "final.json").read_text()) == undisturbed("full")[0]
    log = log_of(out)
    for step in (4, 6, 8):
        assert f"the checkpoint of step {step} could not be written: " in log
    assert f"the newest whole one is {out / 'checkpoint-2'}. Training goes on" in log


def test_a_disk_that_stays_full_is_an_error_in_the_end(server, undisturbed, tmp_path):
    out = tmp_path / "out"
    status, _ = server.run("full", out, full_disk=[3, 13])
    assert status == 1
    message = (out / "stopped.txt").read_text()
    assert message.startswith("OSError: training is done, and the checkpoint of step 12 could not be written: ")
    assert f"the newest whole one is {out / 'checkpoint-2'}; nor could the weights alone" in message
    assert not list(out.glob(".tmp-*"))
    # There is room again:
    for leftover in out.glob("model.safetensors"):
        leftover.unlink()
    assert server.to_the_end("full", out) == undisturbed("full")[0]


def test_a_damaged_checkpoint_is_passed_over_and_the_end_is_the_same(server, undisturbed, tmp_path):
    assert server.run("full", tmp_path, kill=["step", 8])[0] == KILLED
    weights = tmp_path / "checkpoint-6" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert server.to_the_end("full", tmp_path) == undisturbed("full")[0]
