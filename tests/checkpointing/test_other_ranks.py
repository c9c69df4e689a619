"""Checkpoints of two ranks resumed on one and on four, and of one kind of sharding under another: equal losses."""

import pytest
import torch

from dpofast.checkpointing.folder import newest_whole
from dpofast.checkpointing.progress import Written, progress_file, read_progress, seed_anew
from dpofast.common.ranks import Ranks
from dpofast.training.log_window import LogWindow, merged_windows
from tests.support.resume_cases import CASES, MODES, killed_on_ranks, on_ranks, resumed, run

pytestmark = pytest.mark.slow(60)


def equal(found, expected):
    """The same logs, steps and counts, losses to 1e-6, and about the same weights."""
    assert len(found["logs"]) == len(expected["logs"]) == 5
    for log, other in zip(found["logs"], expected["logs"], strict=True):
        assert log == pytest.approx(other, abs=1e-6, rel=1e-6)
    assert found["stateful"] == expected["stateful"] > 0
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["sharded", pytest.param("fsdp", marks=pytest.mark.ranks), "ddp"])
def test_two_ranks_then_one_process(written, tmp_path, mode):
    folder, ended = written(mode)
    for case, options in CASES.items():
        found = run(str(tmp_path / case), 1, source=f"{folder}/{case}/checkpoint-5", **options)
        equal(found, ended[0][case])
        (said,) = found["warnings"]
        assert "checkpoint-5, written by 2 processes, on 1: losses are the same but for the rounding" in said


@pytest.mark.ranks
@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_then_four(written, tmp_path, mode):
    folder, ended = written(mode)
    cases = {name: {**case, "source": f"{folder}/{name}/checkpoint-5"} for name, case in CASES.items()}
    for found in on_ranks(tmp_path, 4, cases, MODES[mode]):
        for case in CASES:
            equal(found[case], ended[0][case])


@pytest.mark.ranks
@pytest.mark.parametrize(("mode", "then"), [("sharded", "fsdp"), ("fsdp", "sharded"), ("sharded", "ddp")])
def test_one_kind_of_checkpoint_under_another(written, tmp_path, mode, then):
    folder, ended = written(mode)
    cases = {name: {**case, "source": f"{folder}/{name}/checkpoint-5"} for name, case in CASES.items()}
    found = on_ranks(tmp_path, 2, cases, MODES[then])[0]
    for case in CASES:
        equal(found[case], ended[0][case])


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("mode", "kill"),
    [
        ("sharded", ["step", 8, 0]),
        ("sharded", ["before shards", 2, 1]),
        ("sharded", ["shards", 2, 1]),
        ("sharded", ["after shards", 2, 0]),
        ("sharded", ["pickle", 3, 1]),
        ("sharded", ["rename", 2, 0]),
        ("ddp", ["step", 8, 1]),
        ("ddp", ["pickle", 4, 1]),
        ("ddp", ["rename", 2, 0]),
    ],
    ids=str,
)
def test_a_killed_rank(written, tmp_path, mode, kill):
    codes = killed_on_ranks(tmp_path / "run", 2, {"kill": kill}, MODES[mode])
    assert codes[kill[2]] == -9 and codes[1 - kill[2]] not in (0, None), codes
    newest, damaged = newest_whole(tmp_path / "run" / "full")
    assert newest.name == "checkpoint-5" and not damaged
    expected = written(mode)[1][0]["full"]
    same = resumed(tmp_path / "two", 2, newest, MODES[mode])
    assert same["logs"] == expected["logs"]
    assert all(torch.equal(weight, expected["weights"][name]) for name, weight in same["weights"].items())
    equal(resumed(tmp_path / "one", 1, newest, {}), expected)


@pytest.mark.ranks
@pytest.mark.parametrize("mode", ["sharded", "ddp"])
def test_a_killed_rank_then_four(written, tmp_path, mode):
    codes = killed_on_ranks(tmp_path / "run", 2, {"kill": ["step", 8, 1]}, MODES[mode])
    assert codes[1] == -9 and codes[0] not in (0, None), codes
    newest, _ = newest_whole(tmp_path / "run" / "full")
    equal(resumed(tmp_path / "four", 4, newest, MODES[mode]), written(mode)[1][0]["full"])


# ---- sums since the last log ----------------------------------------------------------------------------------------


def window(rank):
    """The state of a rank that added two pairs' losses: rank + 1 each."""
    log = LogWindow()
    log.sums.add("loss", torch.tensor(2.0 * (rank + 1)), 2)
    log._counts.update({"tokens": 10 * (rank + 1), "shares": 1})
    log._seconds, log.num_tokens = 1.0 + rank, 100
    return log.state_dict()


def test_sums_are_added_up_once_for_processes_that_share_their_data(tmp_path):
    for process in range(4):  # two and two share
        state = {"tr_loss": torch.tensor(3.0), "last_logged": 4, "stopped": False, "subclass": window(process // 2)}
        torch.save(state, progress_file(tmp_path, process, 4))
    assert progress_file(tmp_path, 3, 4).name == "progress_3.pt" and progress_file(tmp_path, 0, 1).name == "progress.pt"
    ranks = Ranks()
    found = read_progress(tmp_path, Written(4, 2), ranks, "cpu", merged_windows)
    assert found.tr_loss == 3 and found.last_logged == 4 and not found.stopped
    log = LogWindow()
    log.load_state_dict(found.subclass)
    logged = log.read(ranks)
    assert logged["loss"] == 1.5 and logged["num_tokens"] == 130 and logged["tokens_per_second"] == 15

    ranks.rank, other = 1, LogWindow()
    other.load_state_dict(read_progress(tmp_path, Written(4, 2), ranks, "cpu", merged_windows).subclass)
    assert other.has_steps and "loss" not in other.read(Ranks())

    ranks.rank, ranks.size, ranks.processes, ranks.process = 1, 2, 4, 3  # the same processes read their own
    same = read_progress(tmp_path, Written(4, 2), ranks, "cpu", merged_windows)
    assert torch.equal(same.subclass["metrics"]["sums"]["loss"], torch.tensor(4.0))


def test_random_states_begin_anew_by_seed_step_and_rank():
    drawn = []
    for numbers in ((42, 5, 0), (42, 5, 0), (42, 5, 1), (42, 6, 0), (43, 5, 0)):
        seed_anew(*numbers)
        drawn.append(torch.rand(()).item())
    assert drawn[0] == drawn[1] and len(set(drawn)) == 4
