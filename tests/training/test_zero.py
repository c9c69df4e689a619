"""ZeRO-3 from the constructor on, or from loading on: the reference pass on shares equals one process's."""

import pytest
import torch

from tests.support.ranks_cases import two_ranks
from tests.support.zero_cases import CASES, FURTHER, MODES, partitioned

pytestmark = [pytest.mark.slow(300), pytest.mark.deepspeed]
few = two_ranks("zero", run=partitioned, modes=MODES)
many = two_ranks("zero further", run=partitioned, modes=MODES)


def check(results, case, folder):
    first, second = (rank[case] for rank in results)
    alone = partitioned(folder, 1, **{**CASES, **FURTHER}[case])
    assert first["early"] and first["wrapped"] == "DeepSpeedEngine"
    assert first["columns"] == second["columns"] and first["logs"] == second["logs"]
    assert first["identity"] == second["identity"] == alone["identity"] and first["keys"] == alone["keys"]
    apart = 0.1 if case == "dialogues" else 0.02  # pairs of one beginning on two ranks share none of it
    assert first["flops"] == pytest.approx(alone["flops"], rel=apart)
    for ours, truth in zip(first["columns"], alone["columns"], strict=True):
        assert ours == pytest.approx(truth, rel=1e-5, abs=1e-5)
    for name in ("begin", "further", "end"):
        assert first[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-5)
    assert len(first["logs"]) == len(alone["logs"]) == 10
    for ours, truth in zip(first["logs"], alone["logs"], strict=True):
        assert ours == pytest.approx(truth, rel=1e-4, abs=1e-5)
    assert first["weights"].keys() == alone["weights"].keys()
    for name, truth in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], truth, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_equals_one_process(few, case, tmp_path):
    check(few, case, tmp_path)


@pytest.mark.parametrize("case", ["plain", "partitioned at load"])
def test_the_pass_holds_a_share_and_a_layer(few, case):
    for rank in few:
        run = rank[case]
        assert 0 < max(run["most"]) <= 1.05 * (run["bytes"] / 2 + run["layer"])


@pytest.mark.ranks
@pytest.mark.parametrize("case", FURTHER)
def test_further_cases_equal_one_process(many, case, tmp_path):
    check(many, case, tmp_path)
