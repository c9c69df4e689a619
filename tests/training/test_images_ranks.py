"""Images on some processes of a step and none on others: the same run on one process and on two gloo ranks."""

import pytest
import torch

from tests.support.images_ranks_cases import CASES, FSDP_CASES, on_two_ranks, train

pytestmark = pytest.mark.slow(300)


@pytest.fixture(scope="module")
def replicated(tmp_path_factory):
    return on_two_ranks(tmp_path_factory.mktemp("ddp"), "ddp")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return on_two_ranks(tmp_path_factory.mktemp("fsdp"), "fsdp")


def check_equal(ranks, case, folder):
    first, second = (results[case] for results in ranks)
    assert first["logs"] == second["logs"] and first["eval"] == second["eval"]
    expected = train(folder, 1, **FSDP_CASES[case])
    assert len(first["logs"]) == len(expected["logs"]) >= 5
    for log, other in zip([*first["logs"], first["eval"]], [*expected["logs"], expected["eval"]], strict=True):
        assert log == pytest.approx(other, rel=1e-4, abs=1e-5)
    assert first["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        torch.testing.assert_close(first["weights"][name], value, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_process(replicated, case, tmp_path):
    assert {results[case]["wrapped"] for results in replicated} == {"DistributedDataParallel"}
    check_equal(replicated, case, tmp_path)


@pytest.mark.parametrize("case", FSDP_CASES)
def test_fsdp2_equals_one_process(sharded, case, tmp_path):
    assert all(results[case]["wrapped"].startswith("FSDP") for results in sharded)
    check_equal(sharded, case, tmp_path)
