"""Models whose forward another library has wrapped on the instance: known wrappers come off or stay."""

import copy
import functools
import warnings

import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, get_peft_model
from torch import nn

from dpofast import attach_logprob_head, detach_logprob_head, pack, reference, sequence_logprobs
from dpofast.head.options import LogprobOutput
from dpofast.model.lm_head import LogprobLinear
from dpofast.model.wrappers import input_device
from tests.support.tiny import tiny_model, tiny_pairs
from tests.support.wrappers import WRAPPERS, autocast, hooked, mixed_precision

EXACT = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture
def batch():
    (batch,) = pack(tiny_pairs())
    return batch


@pytest.fixture
def truth(batch):
    """Sequence log-probs of a model that nobody has wrapped, from its own padded logits."""
    with torch.no_grad():
        logps = reference.padded_logprobs(tiny_model(), *batch.padded(), use_cache=False)
    return sequence_logprobs(LogprobOutput(logps), batch)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("wrappers", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.filterwarnings("ignore:.*accelerate's autocast")
def test_a_model_that_others_wrapped_is_attached(wrappers, padded, batch, truth):
    model = functools.reduce(lambda model, wrap: wrap(model), wrappers, tiny_model())
    attach_logprob_head(model, padded=padded)
    torch.testing.assert_close(sequence_logprobs(model(packed=batch), batch), truth, **EXACT)
    ids = torch.arange(3, 9)[None]
    assert torch.equal(model(ids).logits, tiny_model()(ids).logits)
    assert ("forward" in vars(model)) == (hooked in wrappers)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.lm_head.weight.mul_(2.0)
    torch.testing.assert_close(sequence_logprobs(model(packed=batch), batch), truth, **EXACT)
    assert not torch.allclose(sequence_logprobs(copied(packed=batch), batch), truth)
    detach_logprob_head(model)
    assert torch.equal(model(ids).logits, tiny_model()(ids).logits)
    assert type(model) is type(tiny_model()) and type(model.lm_head) is nn.Linear


def test_the_autocast_that_comes_off_is_said(batch, truth):
    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    model = autocast(adapted)  # wraps the PeftModel's forward, not its base model's
    with pytest.warns(UserWarning, match="LlamaForCausalLM: accelerate's autocast.* is taken off"):
        attach_logprob_head(model)
    torch.testing.assert_close(sequence_logprobs(model(packed=batch), batch), truth, **EXACT)


def test_a_model_that_is_prepared_after_attaching_keeps_its_autocast(batch):
    model = autocast(attach_logprob_head(tiny_model()))
    rounded = model(packed=batch).logps
    assert not torch.equal(rounded, attach_logprob_head(tiny_model())(packed=batch).logps)
    with mixed_precision() as accelerator:
        bare = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert torch.equal(bare(packed=batch).logps, attach_logprob_head(tiny_model())(packed=batch).logps)


def test_attaching_again_takes_off_the_autocast_of_a_training_since(batch, truth):
    """DPOTrainer attaches the head and leaves it on, and accelerate's autocast with it."""
    model = autocast(attach_logprob_head(tiny_model()))
    with pytest.warns(UserWarning, match="LlamaForCausalLM: accelerate's autocast.* is taken off") as warned:
        assert attach_logprob_head(model) is model
    assert [warning.filename for warning in warned] == [__file__]
    torch.testing.assert_close(sequence_logprobs(model(packed=batch), batch), truth, **EXACT)
    with warnings.catch_warnings(action="error"):
        attach_logprob_head(model)


@pytest.mark.parametrize("padded", [False, True])
def test_accelerates_hooks_still_run(padded, batch):
    model, called = attach_logprob_head(hooked(tiny_model()), padded=padded), []
    for module in (model, model.model, model.lm_head):
        plain = module._hf_hook.pre_forward
        module._hf_hook.pre_forward = lambda module, *a, plain=plain, **k: (
            called.append(module),
            plain(module, *a, **k),
        )[1]
    model(packed=batch)
    assert set(called) == {model, model.model, model.lm_head} and isinstance(model.lm_head, LogprobLinear)


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
@pytest.mark.parametrize("padded", [False, True])
def test_weights_on_disk_are_read_in_each_call(family, padded, batch, tmp_path):
    expected = attach_logprob_head(tiny_model(family))(packed=batch).logps
    places = {"model.embed_tokens": "disk", "model.layers": "disk", "model.norm": "cpu", "lm_head": "disk"}
    if family == "llama-tied":
        places |= {"model.embed_tokens": "cpu", "lm_head": "cpu"}
    rest = {name: "cpu" for name, _ in tiny_model(family).model.named_children() if f"model.{name}" not in places}
    places |= {f"model.{name}": place for name, place in rest.items()}
    model = dispatch_model(tiny_model(family), places, main_device="cpu", offload_dir=tmp_path)
    assert any(weight.is_meta for weight in model.parameters())
    assert input_device(model) == torch.device("cpu")
    attach_logprob_head(model, padded=padded)
    torch.testing.assert_close(model(packed=batch).logps, expected, **EXACT)


@pytest.mark.parametrize("part", ["model", "head"])
def test_any_other_forward_on_the_instance_is_refused_by_name(part):
    model = tiny_model()
    module = model if part == "model" else model.lm_head
    plain = module.forward

    def scaled(*args, **kwargs):
        return plain(*args, **kwargs)

    module.forward = scaled
    name = type(module).__name__
    with pytest.raises(
        ValueError, match=rf"{name}: expected its class's forward.*test_wrappers.*scaled.*load the model"
    ):
        attach_logprob_head(model)
    assert type(model) is type(tiny_model()) and type(model.lm_head) is nn.Linear and module.forward is scaled


def test_a_hook_on_the_head_that_needs_logits_is_refused():
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits.float())
    with pytest.raises(ValueError, match=r"a forward hook on its LM head \(.*lambda.*\).*remove it \(AttributeError"):
        attach_logprob_head(model)
    assert type(model) is type(tiny_model())
