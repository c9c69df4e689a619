"""The same run on one process and on two gloo ranks: DDP, FSDP2, and DeepSpeed (pytest -m deepspeed)."""

import math

import pytest
import torch

from tests.support.ranks_cases import (
    BF16_CASES,
    CASES,
    FSDP_CASES,
    LIST_CASES,
    LONG_CASES,
    UNLIMITED,
    ZERO_CASES,
    on_two_ranks,
    train,
    two_ranks,
)

pytestmark = pytest.mark.slow(300)

replicated, sharded, lists_replicated, long_pairs_replicated = map(two_ranks, ("ddp", "fsdp", "lists", "long"))


def alone(case, folder):
    """The case on one process, from begin to end."""
    return train(folder, 1, **{**{**CASES, **LIST_CASES}[case], "resumed": False})


def check_equal(run, expected):
    assert len(run["logs"]) == len(expected["logs"]) > 0
    for log, other in zip([*run["logs"], run["eval"]], [*expected["logs"], expected["eval"]], strict=True):
        assert log == pytest.approx(other, rel=1e-4, abs=1e-5)
    assert run["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        torch.testing.assert_close(run["weights"][name], value, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_process(replicated, case, tmp_path):
    first, second = (results[case] for results in replicated)
    assert first["logs"] == second["logs"] and first["eval"] == second["eval"]
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    check_equal(first, alone(case, tmp_path))


@pytest.mark.parametrize("case", LIST_CASES)
def test_two_ranks_equal_one_process_on_lists_and_columns(lists_replicated, case, tmp_path):
    first, second = (results[case] for results in lists_replicated)
    assert first["logs"] == second["logs"] and first["eval"] == second["eval"]
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    check_equal(first, alone(case, tmp_path))


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


@pytest.fixture(scope="module")
def long_pairs_alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    return {case: train(folder / case, 1, **options) for case, options in LONG_CASES.items()}


@pytest.mark.parametrize("case", LONG_CASES)
def test_neither_max_tokens_nor_sharing_nor_accumulation_nor_ranks_matter(
    case, long_pairs_alone, long_pairs_replicated
):
    first, *_ = long_pairs_alone.values()
    check_equal(long_pairs_alone[case], first)
    for ranks in long_pairs_replicated:
        check_equal(ranks[case], first)


def test_long_pairs_take_many_micro_batches_a_few_or_one(long_pairs_alone, long_pairs_replicated):
    for runs in (long_pairs_alone, long_pairs_replicated[0]):
        name = "max_tokens {}, share none, accumulation 1"
        many, few, one = (runs[name.format(most)]["calls"] for most in (1024, 4096, UNLIMITED))
        assert many > 4 * few > 4 * 15 and one == 10


@pytest.mark.parametrize("case", FSDP_CASES)
def test_fsdp2_equals_one_process(sharded, case, tmp_path):
    first, second = (results[case] for results in sharded)
    assert first["logs"] == second["logs"] and first["eval"] == second["eval"]
    expected = alone(case, tmp_path)
    check_equal(first, expected)
    assert first["saved"].keys() == expected["saved"].keys()
    for name, value in expected["saved"].items():
        torch.testing.assert_close(first["saved"][name], value, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("case", [*FSDP_CASES, *BF16_CASES])
def test_fsdp2_trains_on_shards(sharded, case):
    first, second = (results[case] for results in sharded)
    assert first["wrapped"].startswith("FSDP") and len(first["shards"]) == (5 if "resumed" in case else 10)
    for (units, here, whole), (_, there, _) in zip(first["shards"], second["shards"], strict=True):
        assert units >= 3 + 3 and here + there == whole and max(here, there) < 0.55 * whole


def test_a_sharded_model_is_trained_once(sharded):
    assert {run["again"] for run in sharded[0].values()} == {
        "train: this model is sharded already: build a new trainer, and resume from a checkpoint to go on"
    }


def test_fsdp2_exchanges_gradients_once_a_step_unless_told(sharded):
    count = {name: run["synchronizations"] for name, run in sharded[0].items()}
    assert 0 < count["plain"] == count["max_tokens 24"] == count["accumulation"] < count["synchronized each time"]


@pytest.mark.parametrize("case", BF16_CASES)
def test_fsdp2_rounds_no_log_prob_to_16_bits(sharded, case, tmp_path):
    run, begin = sharded[0][case], sharded[0][case]["logs"][0]
    assert begin["rewards/margins"] == 0 and begin["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for name, value in train(tmp_path, 1, **BF16_CASES[case])["weights"].items():
        assert run["weights"][name].dtype == torch.float32
        torch.testing.assert_close(run["weights"][name], value, atol=1e-3, rtol=1e-3, msg=name)
