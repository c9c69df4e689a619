"""Runs with sequence_parallel_size against the same runs on one process (the matrix: pytest -m ranks)."""

import pytest
import torch

from tests.support.ranks_cases import two_ranks
from tests.support.sequence_cases import ALL, FEW, SEQUENCE_MODES, run

few, sp2, sp2_dp2, sp4, sp2_fsdp, sp2_fsdp4 = (
    two_ranks(mode, run=run, modes=SEQUENCE_MODES, world=world)
    for mode, world in {"few": 2, "sp2": 2, "sp2 dp2": 4, "sp4": 4, "sp2 fsdp": 2, "sp2 fsdp4": 4}.items()
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The results of cases on one process, each run once."""
    known = {}

    def result(case):
        if case not in known:
            options = {**ALL[case], "resumed": False} if "resumed" in ALL[case] else ALL[case]
            known[case] = run(tmp_path_factory.mktemp("alone"), 1, **options)
        return known[case]

    return result


def check_equal(results, case, alone):
    """Every rank has the same results, and they are those of one process."""
    runs, expected = [rank[case] for rank in results], alone(case)
    for name, value in expected["weights"].items():
        for ours in runs:
            torch.testing.assert_close(ours["weights"][name], value, atol=1e-5, rtol=1e-5, msg=name)
    if "logs" not in expected:
        for ours in runs:
            assert ours["positions"] == expected["positions"] and ours["pairs"] == expected["pairs"]
            assert ours["operations"] == pytest.approx(expected["operations"], rel=1e-6)
            assert ours["running"] == pytest.approx(expected["running"], rel=1e-4)
            assert ours["metrics"] == pytest.approx(expected["metrics"], rel=1e-4, abs=1e-5)
            torch.testing.assert_close(
                *map(torch.as_tensor, (ours["predictions"], expected["predictions"])), atol=1e-5, rtol=1e-4
            )
        return
    assert all(ours["logs"] == runs[0]["logs"] and ours["eval"] == runs[0]["eval"] for ours in runs)
    logs, others = [*runs[0]["logs"], runs[0]["eval"]], [*expected["logs"], expected["eval"]]
    assert len(logs) == len(others) > 1
    for log, other in zip(logs, others, strict=True):
        assert log == pytest.approx(other, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("case", FEW)
def test_two_ranks_that_share_rows_equal_one_process(few, case, alone):
    check_equal(few, case, alone)


@pytest.mark.ranks
@pytest.mark.parametrize("case", SEQUENCE_MODES["sp2"][0])
def test_two_ranks_equal_one_process(sp2, case, alone):
    check_equal(sp2, case, alone)


@pytest.mark.ranks
@pytest.mark.parametrize("case", SEQUENCE_MODES["sp2 dp2"][0])
def test_two_groups_of_two_equal_one_process(sp2_dp2, case, alone):
    check_equal(sp2_dp2, case, alone)


@pytest.mark.ranks
@pytest.mark.parametrize("case", SEQUENCE_MODES["sp4"][0])
def test_four_ranks_equal_one_process(sp4, case, alone):
    check_equal(sp4, case, alone)


@pytest.mark.ranks
@pytest.mark.parametrize("case", SEQUENCE_MODES["sp2 fsdp"][0])
def test_ranks_that_share_rows_and_weights_equal_one_process(sp2_fsdp, case, alone):
    check_equal(sp2_fsdp, case, alone)


@pytest.mark.ranks
@pytest.mark.parametrize("case", SEQUENCE_MODES["sp2 fsdp4"][0])
def test_weights_are_sharded_over_all_groups(sp2_fsdp4, case, alone):
    check_equal(sp2_fsdp4, case, alone)
