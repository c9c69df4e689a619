"""Checks and checkpoints for FSDP, tested without ranks; tests/training/test_ranks.py trains under it."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from dpofast import DPOConfig, DPOTrainer
from dpofast.checkpointing.fsdp import load_optimizer, load_weights
from dpofast.training.parallel.fsdp import cast_parameters, check_sharding
from tests.support.tiny import tiny_dataset, tiny_model, tiny_tokenizer


def gpus(**options):
    state = SimpleNamespace(distributed_type=DistributedType.MULTI_GPU)
    return SimpleNamespace(distributed_state=state, **{"fsdp": True, "fsdp_config": {}, **options})


def test_fsdp_without_gpus_is_refused_before_the_data_is_read(tmp_path):
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", fsdp=True)
    with pytest.raises(ValueError, match=r"fsdp: expected several GPUs under a launcher \(torchrun\), got cpu, 1 proc"):
        DPOTrainer(tiny_model(), args=args, train_dataset="not looked at", processing_class=tiny_tokenizer())


def test_fsdp_of_the_launcher_is_seen(tmp_path, monkeypatch):
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="would train whole copies without a word; leave fsdp out for DDP"):
        DPOTrainer(tiny_model(), args=args, train_dataset=tiny_dataset(), processing_class=tiny_tokenizer())
    launched = gpus(fsdp=None)
    with pytest.raises(ValueError, match=r"fsdp_config: expected version 2 \(FSDP2\), got 1"):
        check_sharding(launched)
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_sharding(launched)
    only_model = gpus(fsdp=None, save_only_model=True)
    with pytest.raises(ValueError, match="save_only_model: expected no SHARDED_STATE_DICT beside it: a checkpoint wit"):
        check_sharding(only_model)  # accelerate's default
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")
    check_sharding(launched)
    check_sharding(only_model)
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "LOCAL_STATE_DICT")
    with pytest.raises(ValueError, match="expected FULL_STATE_DICT or SHARDED_STATE_DICT, got LOCAL_STATE_DICT"):
        check_sharding(launched)


def test_what_fsdp2_is_taken(tmp_path):
    check_sharding(gpus())
    check_sharding(gpus(fsdp=None))
    check_sharding(gpus(fsdp_config={"version": 2, "state_dict_type": "FULL_STATE_DICT"}))
    with pytest.raises(ValueError, match='got 1: set {"version": 2}'):
        check_sharding(gpus(fsdp_config={"version": 1}))
    check_sharding(gpus(fsdp_config={"cpu_ram_efficient_loading": "false"}))
    for told in (True, "true"):  # as JSON, or as transformers leaves a flag's
        with pytest.raises(ValueError, match="cpu_ram_efficient_loading: expected false or nothing, got true"):
            check_sharding(gpus(fsdp_config={"cpu_ram_efficient_loading": told}))
    sharded = {"state_dict_type": "SHARDED_STATE_DICT"}
    check_sharding(gpus(fsdp_config=sharded))
    with pytest.raises(ValueError, match="save_on_each_node: expected no SHARDED_STATE_DICT beside it: the shards of"):
        check_sharding(gpus(fsdp_config=sharded, save_on_each_node=True))


def test_parameters_change_their_dtype_and_buffers_do_not():
    model = tiny_model()
    cast_parameters(model, None)
    assert model.dtype == torch.float32
    cast_parameters(model, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_weights_come_back_from_safetensors(tmp_path, family):
    saved, model = tiny_model(family), tiny_model(family)
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter.add_(1.0)
    saved.save_pretrained(tmp_path, max_shard_size="20kB")
    load_weights(model, str(tmp_path))
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in model.state_dict().items())


def test_other_weights_are_refused(tmp_path):
    tiny_model(num_hidden_layers=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected the weights of LlamaForCausalLM .* 9 are missing .* 0 unknown"):
        load_weights(tiny_model(), str(tmp_path))


def test_an_optimizer_state_that_is_not_there_or_of_other_weights_is_refused(tmp_path):
    def trainer(model):
        args, weights = SimpleNamespace(process_index=0), [w for w in model.parameters() if w.requires_grad]
        optimizer = torch.optim.AdamW(weights)
        return SimpleNamespace(args=args, model=model, optimizer=optimizer, _together=lambda part: part())

    before, model = trainer(tiny_model()), tiny_model()
    with pytest.raises(
        ValueError, match="state of a run under FSDP, optimizer.bin, which is not there: resume with the"
    ):
        load_optimizer(before, str(tmp_path))
    torch.save(get_optimizer_state_dict(before.model, before.optimizer), tmp_path / "optimizer.bin")
    model.lm_head.requires_grad_(False)
    groups = r"expected groups of \[(\d+)\] weights as in this run, got \[\d+\]; not in both: \['lm_head.weight'\]"
    with pytest.raises(ValueError, match=groups):
        load_optimizer(trainer(model), str(tmp_path))
