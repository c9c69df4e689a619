"""Models whose files have other names than the model (mixtures of experts, composites): resumed and read whole."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dpofast import attach_logprob_head
from dpofast.checkpointing.fsdp import load_weights
from dpofast.checkpointing.weights import load_converted, names_in
from tests.support.tiny import tiny_dataset, tiny_model
from tests.support.tiny_training import SAVING, losses_of, make_trainer, weights_of
from tests.support.vision_models import vision_model

MODELS = {"mixtral": lambda: tiny_model("mixtral"), "llava": lambda: vision_model("llava")}


def zeroed(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("name", MODELS)
def test_a_killed_run_goes_on_to_the_last_bit(tmp_path, name):
    ids = ("prompt_ids", "chosen_ids", "rejected_ids")
    text = tiny_dataset().map(lambda row: {column: [i % 80 for i in row[column]] for column in ids})  # no placeholder
    whole = make_trainer(tmp_path / "whole", model=MODELS[name](), train=text, **SAVING)
    whole.train()
    folder = tmp_path / "whole" / "checkpoint-4"
    assert not names_in(str(folder)) <= set(whole.model.state_dict())
    again = make_trainer(tmp_path / "again", model=MODELS[name](), train=text, **SAVING)
    again.train(resume_from_checkpoint=str(folder))
    assert torch.equal(weights_of(again), weights_of(whole))
    assert losses_of(again) == losses_of(whole)


def test_the_best_model_is_the_best_one(tmp_path):
    trainer = make_trainer(
        tmp_path, model=MODELS["mixtral"](), evaluation=make_trainer(tmp_path / "data").train_dataset, **SAVING,
        eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="loss",
        greater_is_better=True,
    )  # fmt: skip
    kept = {}

    def keep(*given, **more):
        kept[trainer.state.global_step] = weights_of(trainer).clone()

    save = trainer._save_checkpoint
    trainer._save_checkpoint = lambda *given: (keep(), save(*given))
    trainer.train()
    assert trainer.state.best_global_step < trainer.state.global_step
    assert torch.equal(weights_of(trainer), kept[trainer.state.best_global_step])


def test_weights_of_several_dtypes_keep_every_bit(tmp_path):
    model = vision_model("gemma3")
    model.model.language_model.to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    other = vision_model("gemma3")
    other.model.language_model.to(torch.bfloat16)
    assert load_converted(zeroed(other), str(tmp_path))
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    model = vision_model("llava")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state.pop("language_model.lm_head.weight")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="expected the weights of Llava.* 1 are missing or unknown: lm_head.weight"):
        load_converted(model, str(tmp_path))


@pytest.mark.parametrize("name", MODELS)
def test_shards_are_loaded(tmp_path, mesh, name):
    model, sharded = MODELS[name](), attach_logprob_head(zeroed(MODELS[name]()))
    model.save_pretrained(tmp_path)
    fully_shard(sharded, mesh=mesh)
    load_weights(sharded, str(tmp_path))
    for (own, ours), (_, theirs) in zip(sharded.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(ours.full_tensor(), theirs), own


def test_a_checkpoint_that_lacks_weights_is_refused_by_shards(tmp_path, mesh):
    tiny_model("mixtral", num_hidden_layers=1).save_pretrained(tmp_path)
    sharded = tiny_model("mixtral", num_hidden_layers=2)
    fully_shard(sharded, mesh=mesh)
    with pytest.raises(ValueError, match="expected the weights of .*Mixtral.* 9 are missing .* 0 unknown"):
        load_weights(sharded, str(tmp_path))
