"""Runs with sequence_parallel_size against the same runs on one process (the matrix: pytest -m ranks)."""

import pytest
import torch
from datasets import Dataset
from transformers import MixtralConfig, Qwen3NextConfig

from dpofast import DPOConfig, DPOTrainer
from dpofast.cli.main import main
from dpofast.training.parallel.sizes import check_heads
from tests.support.ranks_cases import on_two_ranks, two_ranks
from tests.support.sequence_cases import ALL, FEW, SEQUENCE_MODES, run
from tests.support.tiny import tiny_dataset

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
    assert runs[0]["weights"].keys() == expected["weights"].keys()
    for ours in filter(lambda rank: rank["weights"], runs):  # of sharded ones rank 0 alone has the whole
        for name, value in expected["weights"].items():
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


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_equals_one_process(stage, alone, tmp_path):
    mode = f"sp2 zero{stage}"
    results = on_two_ranks(tmp_path, mode, run=run, modes=SEQUENCE_MODES)
    for case in SEQUENCE_MODES[mode][0]:
        assert results[0][case]["wrapped"] == "DeepSpeedEngine"
        check_equal(results, case, alone)


@pytest.mark.ranks
def test_out_of_memory_in_a_forward_ends_the_run(tmp_path):
    modes = {"fails": ({"fails": {"fails": {"most": 30, "rank": 1}}}, SEQUENCE_MODES["sp2"][1])}
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="CUDA out of memory"):
        on_two_ranks(tmp_path, "fails", modes=modes)


def config(folder, **options):
    options = {"sequence_parallel_size": 2, "use_cpu": True, "report_to": "none", **options}
    return DPOConfig(output_dir=str(folder), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padded": True}, "padded: not supported with sequence_parallel_size=2: rows are divided inside packed"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha: not supported with sequence_parallel_size=2"),
        ({"disable_dropout": False}, "disable_dropout: not supported with sequence_parallel_size=2"),
        (
            {"router_aux_loss_coef": 0.1},
            "router_aux_loss_coef: not supported with sequence_parallel_size=2.*set it to 0",
        ),
        (
            {"sequence_parallel_size": 3},
            r"sequence_parallel_size: expected a divisor of the 4 processes \(1, 2, 4\), got 3",
        ),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size, sequence_parallel_size: expected one of them above 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_needs_whole_rows_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(DPOConfig, "world_size", 4)
    with pytest.raises(ValueError, match=message):
        DPOTrainer("there is no such model", args=config(tmp_path, **options), train_dataset=tiny_dataset())


def test_images_are_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(DPOConfig, "world_size", 2)
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c", "images": ["picture.png"]}])
    with pytest.raises(ValueError, match="train_dataset: it has images: with sequence_parallel_size above 1 images"):
        DPOTrainer("there is no such model", args=config(tmp_path), train_dataset=rows)


def test_a_model_whose_rows_cannot_be_divided_is_refused_by_its_config(tmp_path, monkeypatch):
    monkeypatch.setattr(DPOConfig, "world_size", 2)
    with pytest.raises(ValueError, match="router_aux_loss_coef: mixtral has 0.001 by default.*set it to 0"):
        check_heads(MixtralConfig(), config(tmp_path))
    check_heads(MixtralConfig(), config(tmp_path, router_aux_loss_coef=0.0))
    with pytest.raises(ValueError, match="sequence_parallel_size: qwen3_next has recurrent layers"):
        check_heads(Qwen3NextConfig(), config(tmp_path, router_aux_loss_coef=0.0))
    with pytest.raises(
        ValueError, match="mixtral has 6 query and 3 key/value heads, which 4 processes.*of 4 processes 1"
    ):
        monkeypatch.setattr(DPOConfig, "world_size", 4)
        heads = MixtralConfig(num_attention_heads=6, num_key_value_heads=3, hidden_size=24)
        check_heads(heads, config(tmp_path, router_aux_loss_coef=0.0, sequence_parallel_size=4))


def test_the_command_says_how_to_start_several_processes_before_it_loads_anything(tmp_path, capsys):
    flags = ["--model", "there/is-none", "--data", "none.jsonl", "--output_dir", str(tmp_path / "out")]
    assert main(["train", *flags, "--sequence_parallel_size", "2"]) == 2
    error = capsys.readouterr().err
    assert "sequence_parallel_size: expected a divisor of the 1 processes (1), got 2" in error
    assert "torchrun --nproc_per_node 2" in error
