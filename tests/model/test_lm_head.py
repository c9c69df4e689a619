"""LogprobLinear: the attached head is the model's own, whatever happens to the model before or after."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from dpofast import PreferenceLoss, attach_logprob_head, detach_logprob_head, pack
from dpofast.model.attach import PackedPreference
from dpofast.model.lm_head import LogprobLinear
from tests.support.tiny import VOCAB, tiny_model, tiny_pairs

LORA = {"r": 2, "task_type": "CAUSAL_LM"}


@pytest.fixture
def batch():
    (batch,) = pack(tiny_pairs())
    return batch


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_attaching_changes_the_class_of_the_head_and_nothing_else(family, padded):
    model = tiny_model(family)
    head, names, hidden = model.lm_head, [*model.state_dict()], torch.randn(2, 3, 32)
    logits = head(hidden)
    attach_logprob_head(model, padded=padded)
    assert model.lm_head is head and type(head) is LogprobLinear
    assert [*model.state_dict()] == names and "forward" not in vars(head)
    assert (head.weight is model.get_input_embeddings().weight) == (family == "llama-tied")
    assert torch.equal(head(hidden), logits)
    detach_logprob_head(model)
    assert model.lm_head is head and type(head) is nn.Linear


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_detaching_a_copy_leaves_the_original_attached(duplicate, batch):
    model = attach_logprob_head(tiny_model())
    before = model(packed=batch).logps
    copied = detach_logprob_head(duplicate(model))
    assert type(copied.lm_head) is nn.Linear and type(copied) is type(tiny_model())
    assert torch.equal(model(packed=batch).logps, before)


def test_hooks_on_the_head_surround_the_whole_of_it(batch):
    """What sharding relies on: hooks run around the product with the weight, and see the output's tensors."""
    model, seen = attach_logprob_head(tiny_model()), []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append([type(value) for value in inputs]))
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(type(output)))
    model(packed=batch)
    model(packed=batch, preference=PackedPreference(None, PreferenceLoss(kind="simpo"), 12))
    assert seen == [[torch.Tensor], tuple] * 2


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_a_sharded_head_is_whole_while_it_computes(family, batch, tmp_path):
    model, sharded = attach_logprob_head(tiny_model(family)), attach_logprob_head(tiny_model(family))
    expected = model(packed=batch).logps
    expected.sum().backward()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        if family == "llama":  # a unit of its own; a tied weight belongs to the whole model's
            fully_shard(sharded.lm_head, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        logps = sharded(packed=batch).logps
        logps.sum().backward()
        assert torch.equal(logps, expected)
        gradient = sharded.lm_head.weight.grad.full_tensor()
        torch.testing.assert_close(gradient, model.lm_head.weight.grad)
        detach_logprob_head(sharded)
        assert isinstance(sharded.lm_head, FSDPModule) == (family == "llama")
    finally:
        dist.destroy_process_group()


def test_a_head_that_was_exchanged_after_attaching_is_used(batch):
    model, other = attach_logprob_head(tiny_model()), tiny_model()
    other.lm_head.weight.data.mul_(3.0)
    expected = attach_logprob_head(copy.deepcopy(other))(packed=batch).logps
    model.lm_head = other.lm_head
    assert torch.equal(model(packed=batch).logps, expected)
    resized = attach_logprob_head(tiny_model())
    resized.resize_token_embeddings(VOCAB + 3)
    with torch.no_grad():
        assert resized(packed=batch).logps.shape == (batch.num_targets,)


def test_adapters_added_after_attaching(batch):
    before = attach_logprob_head(tiny_model())(packed=batch).logps
    body = get_peft_model(attach_logprob_head(tiny_model()), LoraConfig(target_modules="all-linear", **LORA))
    assert torch.equal(body(packed=batch).logps, before)
    saved = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], **LORA)
    whole = get_peft_model(attach_logprob_head(tiny_model()), saved)
    whole(packed=batch).logps.sum().backward()
    trained = [name for name, p in whole.named_parameters() if "lm_head" in name and p.grad is not None]
    assert trained == ["base_model.model.lm_head.modules_to_save.default.weight"]
    with torch.no_grad():
        whole.get_parameter(trained[0]).mul_(3.0)
        assert not torch.allclose(whole(packed=batch).logps, before)
    detach_logprob_head(whole)
    assert not any(isinstance(module, LogprobLinear) for module in whole.modules())
    head = get_peft_model(attach_logprob_head(tiny_model()), LoraConfig(target_modules=["lm_head"], **LORA))
    with pytest.raises(ValueError, match=r"expected a plain nn.Linear head.*leave the head out"):
        head(packed=batch)


@pytest.mark.slow(10)
@pytest.mark.parametrize("preference", [None, PackedPreference(None, PreferenceLoss(kind="simpo"), 12)])
def test_a_compiled_model_computes_the_same(preference, batch):
    torch.compiler.reset()
    model = attach_logprob_head(tiny_model())
    expected = model(packed=batch, preference=preference).logps
    output = torch.compile(model, backend="aot_eager")(packed=batch, preference=preference)
    torch.testing.assert_close(output.logps, expected, atol=1e-5, rtol=1e-5)
    torch.compiler.reset()
