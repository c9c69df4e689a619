"""The same run on one process and on two gloo ranks: DDP, and DeepSpeed (pytest -m deepspeed)."""

import pytest
import torch
from ranks_cases import CASES, ZERO_CASES, on_two_ranks, train


@pytest.fixture(scope="module")
def replicated(tmp_path_factory):
    return on_two_ranks(tmp_path_factory.mktemp("ddp"), "ddp")


def check_equal(run, alone):
    assert len(run["logs"]) == len(alone["logs"]) > 0
    for log, expected in zip([*run["logs"], run["eval"]], [*alone["logs"], alone["eval"]], strict=True):
        assert log == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert run["weights"].keys() == alone["weights"].keys()
    for name, value in alone["weights"].items():
        torch.testing.assert_close(run["weights"][name], value, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_process(replicated, case, tmp_path):
    first, second = (results[case] for results in replicated)
    assert first["logs"] == second["logs"] and first["eval"] == second["eval"]
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    check_equal(first, train(tmp_path, 1, **CASES[case]))


def test_gradients_are_synchronized_once_a_step(replicated):
    runs = [results[case] for results in replicated for case in ("plain", "max_tokens 24")]
    assert {run["wrapped"] for run in runs} == {"DistributedDataParallel"}
    assert len({run["synchronizations"] for run in runs}) == 1 and runs[0]["synchronizations"] > 0


def test_out_of_memory_on_one_rank_halves_max_tokens_on_all(replicated):
    assert [results["out of memory"]["max_tokens"] for results in replicated] == [
        replicated[0]["out of memory"]["max_tokens"]
    ] * 2
    assert replicated[0]["out of memory"]["max_tokens"] <= 30


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_equals_one_process(stage, tmp_path):
    first, _ = on_two_ranks(tmp_path, f"zero{stage}")
    for case in ZERO_CASES:
        assert first[case]["wrapped"] == "DeepSpeedEngine"
        check_equal(first[case], train(tmp_path, 1, **CASES[case]))


@pytest.mark.parametrize("options", [{"accumulation": 4}, {"max_tokens": 24}, {"max_tokens": 100_000}], ids=str)
def test_neither_accumulation_nor_max_tokens_matters(tmp_path, options):
    check_equal(train(tmp_path, 1, **options), train(tmp_path, 1))
