"""Checkpoints of two ranks resumed on one and on four, and of one kind of sharding under another: equal losses."""

import pytest
import torch

from tests.support.resume_cases import CASES, SHARDED, WHOLE, on_ranks, run

pytestmark = pytest.mark.slow(60)

MODES = {"sharded": SHARDED, "fsdp": WHOLE, "ddp": {}}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """By mode: its folder and what the first rank ended with, written once."""
    done = {}

    def write(mode):
        if mode not in done:
            folder = tmp_path_factory.mktemp(mode)
            done[mode] = folder, on_ranks(folder, 2, CASES, MODES[mode])[0]
        return done[mode]

    return write


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
    folder, expected = written(mode)
    for case, options in CASES.items():
        found = run(str(tmp_path / case), 1, source=f"{folder}/{case}/checkpoint-5", **options)
        equal(found, expected[case])
        (said,) = found["warnings"]
        assert "checkpoint-5, written by 2 processes, on 1: losses are the same but for the rounding" in said
