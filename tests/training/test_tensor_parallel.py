"""Tensor parallelism in DPOTrainer: runs on two and four gloo ranks equal those of one process; what is refused."""

import pytest
import torch
from accelerate import ParallelismConfig
from safetensors.torch import load_file

from dpofast import DPOConfig, DPOTrainer
from dpofast.cli import export
from tests.support.composites import tiny_composite
from tests.support.families import family_model
from tests.support.ranks_cases import on_two_ranks, shared_prompts, two_ranks
from tests.support.tensor_cases import CASES, FEW, GROUPED, MODES, split_trainer, train_split
from tests.support.tiny import tiny_dataset

few, tp2, tp2dp2 = (
    two_ranks(mode, run=train_split, modes=MODES, world=world, apart=True)
    for mode, world in (("few", 2), ("tp2", 2), ("tp2dp2", 4))
)


def check_equal_to_one_process(ranks, case, folder):
    alone = train_split(folder, 1, **{**CASES[case], "resumed": False})
    first = ranks[0][case]
    for other in ranks[1:]:
        assert first["logs"] == other[case]["logs"] and first["eval"] == other[case]["eval"]
        assert all(torch.equal(value, other[case]["weights"][name]) for name, value in first["weights"].items())
    assert len(first["logs"]) == 10
    for log in (first["logs"][0], alone["logs"][0]):
        log.pop("rewards/accuracies")  # of margins that are 0 up to rounding
    for log, expected in zip([*first["logs"], first["eval"]], [*alone["logs"], alone["eval"]], strict=True):
        assert log == pytest.approx(expected, rel=1e-4, abs=1e-5)
    for part in ("weights", "saved"):
        assert first[part].keys() == alone[part].keys()
        for name, value in alone[part].items():
            torch.testing.assert_close(first[part][name], value, atol=1e-5, rtol=1e-5, msg=f"{part} {name}")
    assert max(each[case]["own"] for each in ranks) < 0.6 * sum(map(torch.numel, alone["weights"].values()))


@pytest.mark.slow(300)
@pytest.mark.parametrize("case", FEW)
def test_few_runs_on_two_ranks(few, case, tmp_path):
    check_equal_to_one_process(few, case, tmp_path)


@pytest.mark.ranks
@pytest.mark.slow(900)
@pytest.mark.parametrize("case", CASES)
def test_two_ranks(tp2, case, tmp_path):
    check_equal_to_one_process(tp2, case, tmp_path)


@pytest.mark.ranks
@pytest.mark.slow(900)
@pytest.mark.parametrize("case", GROUPED)
def test_two_groups_of_two_ranks(tp2dp2, case, tmp_path):
    check_equal_to_one_process(tp2dp2, case, tmp_path)


@pytest.mark.ranks
@pytest.mark.slow(60)
@pytest.mark.parametrize("case", ["resumed", "resumed lora"])
def test_checkpoints_of_two_ranks_are_exported_and_go_on_in_one_process(case, tmp_path):
    options = {name: value for name, value in CASES[case].items() if name != "resumed"}
    modes = {"tp2": ({"run": options}, {"tensor_parallel_size": 2})}
    written = on_two_ranks(tmp_path, "tp2", run=train_split, modes=modes)[0]["run"]
    run, lora = tmp_path / "run" / "run", options.pop("lora", False)
    assert export.main([str(run / "checkpoint-10"), str(tmp_path / "exported")]) == 0
    (file,) = (tmp_path / "exported").glob("*.safetensors")
    exported = load_file(file)
    assert exported.keys() == written["saved"].keys()
    assert all(torch.equal(value, written["saved"][name]) for name, value in exported.items())
    trainer = split_trainer(tmp_path / "run", 1, shared_prompts, lora, options)
    if lora:  # whose optimizer has divided and whole weights in groups of their own
        with pytest.raises(ValueError, match="the same weights in all.* the tensor_parallel_size of before"):
            trainer.train(resume_from_checkpoint=str(run / "checkpoint-5"))
        return
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-5"))
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 10
    assert losses == pytest.approx([log["loss"] for log in written["logs"]], abs=1e-6)


@pytest.fixture
def four_processes(monkeypatch):
    """DPOConfig sees four processes; nothing is loaded in these tests, so nobody misses the others."""
    monkeypatch.setattr(DPOConfig, "world_size", property(lambda self: 4))


def made(folder, **options):
    return DPOConfig(output_dir=str(folder / "run"), report_to="none", use_cpu=True, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tensor_parallel_size": 3},
            r"tensor_parallel_size: expected a divisor of the 4 processes \(1, 2, 4\), got 3",
        ),
        ({"tensor_parallel_size": 4}, "tensor_parallel_size: llama has 4 query and 2 key/value heads"),
        (
            {"tensor_parallel_size": 2, "torch_compile": True},
            "torch_compile: not supported with tensor_parallel_size=2",
        ),
        ({"tensor_parallel_size": 2, "max_tokens": "auto"}, "max_tokens: not supported with tensor_parallel_size=2"),
        ({"tensor_parallel_size": 2, "sync_ref_model": True}, "sync_ref_model: not supported"),
        ({"tensor_parallel_size": 2, "sequence_parallel_size": 2}, "expected one of them above 1"),
        (
            {"tensor_parallel_size": 2, "model_init_kwargs": {"device_map": "auto"}},
            "device_map: not supported with tensor_parallel_size=2",
        ),
    ],
)
def test_setups_are_refused_before_anything_is_loaded(four_processes, options, message, tmp_path):
    family_model("llama").config.save_pretrained(tmp_path / "model")  # and no weights
    with pytest.raises(ValueError, match=message):
        DPOTrainer(str(tmp_path / "model"), args=made(tmp_path, **options), train_dataset=tiny_dataset())


def test_a_family_without_a_plan_is_refused_by_name(four_processes, tmp_path):
    family_model("gpt2").config.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="no plan by which to divide gpt2"):
        args = made(tmp_path, tensor_parallel_size=2)
        DPOTrainer(str(tmp_path / "model"), args=args, train_dataset=tiny_dataset())


def test_tied_embeddings_between_groups_are_refused(four_processes, tmp_path):
    family_model("llama", tie_word_embeddings=True).config.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="expected 4, the number of processes, for llama with tied embeddings, got 2"):
        args = made(tmp_path, tensor_parallel_size=2)
        DPOTrainer(str(tmp_path / "model"), args=args, train_dataset=tiny_dataset())


def test_composite_models_are_refused_by_name(four_processes, tmp_path):
    tiny_composite("llava").config.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="expected a language model alone, got "):
        args = made(tmp_path, tensor_parallel_size=2)
        DPOTrainer(str(tmp_path / "model"), args=args, train_dataset=tiny_dataset())


def test_a_whole_model_is_refused(four_processes, tmp_path):
    with pytest.raises(ValueError, match="model: expected a model divided over tensor_parallel_size=2.*a whole one"):
        args = made(tmp_path, tensor_parallel_size=2)
        DPOTrainer(family_model("llama"), args=args, train_dataset=tiny_dataset())


def test_parallelism_config_says_the_same(four_processes, tmp_path):
    args = made(tmp_path, parallelism_config=ParallelismConfig(tp_size=2, dp_shard_size=2))
    assert args.tensor_parallel_size == 2 and args.parallelism_config is None
    with pytest.raises(ValueError, match=r"tp_size · dp_shard_size = 4 processes, got 2 · 1: set dp_shard_size=2"):
        made(tmp_path, parallelism_config=ParallelismConfig(tp_size=2))
    with pytest.raises(ValueError, match="tensor_parallel_size: expected 2 as parallelism_config says"):
        made(tmp_path, tensor_parallel_size=4, parallelism_config=ParallelismConfig(tp_size=2, dp_shard_size=2))
    with pytest.raises(ValueError, match="cp_size: not supported here: set sequence_parallel_size"):
        made(tmp_path, parallelism_config=ParallelismConfig(cp_size=4))
