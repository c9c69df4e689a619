"""model/lora.py: the fused LoRA layer equals PEFT's, and falls back to PEFT's forward in every other case."""

import copy

import accelerate
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from dpofast import attach_logprob_head, pack
from dpofast.model.lora import FusedLoraLinear, fuse_lora
from tests.support.alone import alone
from tests.support.close import named
from tests.support.deep_examples import DEEP
from tests.support.tiny import tiny_model
from tests.support.tiny_training import make_trainer


def layers(dtype=torch.float32, *, shape=(24, 40), rank=4, bias=True, **options):
    """A layer by peft, with an adapter that has been trained, and the same one fused."""
    model = nn.Sequential(nn.Linear(*shape, bias=bias, dtype=dtype))
    options = {"lora_alpha": 3 * rank, **options}
    peft = get_peft_model(model, LoraConfig(r=rank, target_modules=["0"], **options), autocast_adapter_dtype=False)
    for parameter in peft.parameters():
        parameter.data.copy_(torch.randn_like(parameter))
    fused = copy.deepcopy(peft)
    assert fuse_lora(fused) == 1
    return peft, fused


def layer_of(model):
    return model.base_model.model[0]


def run(model, x, upstream):
    """Output and every gradient, as float64."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(upstream.to(y.dtype))
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    return [t.detach().double() for t in (y, x.grad, *grads)]


def is_fused(model, x):
    with torch.enable_grad():
        y = model(x.clone().requires_grad_())
    return "_LoraLinear" in str(y.grad_fn.next_functions[0][0])


def assert_as_accurate(peft, fused, x):
    """Errors against float64 at most twice peft's, of the whole array; a rounding of the largest sum is no error."""
    upstream = torch.randn(*x.shape[:-1], layer_of(peft).out_features)
    truth = run(copy.deepcopy(peft).double(), x.double(), upstream)
    without_signs = copy.deepcopy(peft).double()
    for parameter in without_signs.parameters():
        parameter.data.abs_()
    sums = run(without_signs, x.double().abs(), upstream.abs())
    for exact, summed, theirs, ours in zip(truth, sums, run(peft, x, upstream), run(fused, x, upstream), strict=True):
        assert (ours - exact).norm() <= 2 * (theirs - exact).norm() + torch.finfo(x.dtype).eps * summed.norm()


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    rank=st.integers(1, 9),
    rows=st.sampled_from([(1,), (7,), (2, 3), (0, 5), (2, 2, 33)]),
    bias=st.booleans(),
    use_rslora=st.booleans(),
)
def test_float32_is_as_accurate_as_pefts(shape, rank, rows, bias, use_rslora):
    peft, fused = layers(shape=shape, rank=rank, bias=bias, use_rslora=use_rslora)
    x = torch.randn(*rows, shape[0])
    assert_as_accurate(peft, fused, x)
    assert is_fused(fused, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_is_as_accurate_as_pefts(dtype):
    """As weights, and as the computation of float32 weights under autocast."""
    peft, fused = layers(dtype)
    x = torch.randn(50, 24, dtype=dtype)
    if dtype is torch.bfloat16:
        assert_as_accurate(peft, fused, x)
        return
    upstream = torch.randn(50, 40)
    truth = run(copy.deepcopy(peft).double(), x.double(), upstream)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = run(peft, x, upstream), run(fused, x, upstream)
        assert fused(x).dtype is torch.bfloat16 and is_fused(fused, x)
    for exact, their, our in zip(truth, theirs, ours, strict=True):
        assert (our - exact).norm() <= 2 * (their - exact).norm()


def test_gradients_are_those_of_the_formula():
    _, fused = layers(torch.float64)
    for parameter in fused.parameters():
        parameter.requires_grad_()  # the frozen ones as well
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    names, values = zip(*fused.named_parameters(), strict=True)
    assert torch.autograd.gradcheck(
        lambda x, *values: torch.func.functional_call(fused, dict(zip(names, values, strict=True)), x), (x, *values)
    )


def test_only_what_needs_a_gradient_gets_one():
    _, fused = layers()
    fused(torch.randn(5, 24)).sum().backward()  # an input without a gradient, as a first layer's may be
    assert all((p.grad is not None) == p.requires_grad for p in fused.parameters())


def second_adapter(model):
    model.add_adapter("second", LoraConfig(r=2, target_modules=["0"]))
    model.base_model.set_adapter(["default", "second"])


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"lora_dropout": 0.5}, None),
        ({"use_dora": True}, None),
        ({"lora_bias": True}, None),
        ({}, second_adapter),
        ({}, lambda model: model.merge_adapter()),
        ({}, lambda model: layer_of(model).base_layer.register_forward_hook(lambda *_: None)),
        ({}, lambda model: layer_of(model).lora_A["default"].register_forward_pre_hook(lambda *_: None)),
        ({}, lambda model: layer_of(model).lora_B["default"].register_full_backward_hook(lambda *_: None)),
        ({}, lambda model: setattr(layer_of(model).lora_B["default"], "forward", lambda x: x.new_ones(len(x), 40))),
        ({}, lambda model: layer_of(model).base_layer.bfloat16()),
    ],
    ids="dropout dora lora_bias two merged hook prehook backward forward dtypes".split(),
)
def test_more_than_the_formula_goes_pefts_way(options, change):
    peft, fused = layers(**options)
    torch.manual_seed(1)
    for model in (peft, fused):
        if change is not None:
            change(model)
    for theirs, ours in zip(peft.parameters(), fused.parameters(), strict=True):
        ours.data.copy_(theirs)
    x = torch.randn(6, 24, dtype=layer_of(peft).base_layer.weight.dtype)
    results = []
    for model in (peft, fused):
        torch.manual_seed(2)
        results.append(model(x))
    assert torch.equal(*results) and not is_fused(fused, x)


def test_offloaded_weights_are_brought():
    peft, fused = layers()
    x = torch.randn(6, 24)
    expected = peft(x)
    accelerate.cpu_offload(fused.base_model.model, execution_device=torch.device("cpu"))
    assert torch.equal(fused(x), expected)


def test_a_disabled_adapter_is_the_base_model():
    peft, fused = layers()
    x = torch.randn(6, 24)
    with peft.disable_adapter(), fused.disable_adapter():
        assert torch.equal(peft(x), fused(x))
    assert is_fused(fused, x)


def test_dropout_is_none_in_evaluation():
    _, fused = layers(lora_dropout=0.5)
    assert is_fused(fused.eval(), torch.randn(6, 24))


def test_a_compiled_layer_is_one_graph_of_pefts_formula():
    peft, fused = layers()
    x, upstream = torch.randn(7, 24), torch.randn(7, 40)
    torch.compiler.reset()
    compiled = torch.compile(layer_of(fused), backend="aot_eager", fullgraph=True)
    leaf = x.clone().requires_grad_()
    y = compiled(leaf)
    y.backward(upstream)
    expected = run(peft, x, upstream)
    torch.testing.assert_close(y.double(), expected[0])
    torch.testing.assert_close(leaf.grad.double(), expected[1])
    assert is_fused(fused, x)


def test_a_checkpointed_and_a_copied_layer():
    _, fused = layers()
    copied = copy.deepcopy(fused)
    assert isinstance(layer_of(copied), FusedLoraLinear)
    x, upstream = torch.randn(6, 24), torch.randn(6, 40)
    again = run(lambda_module(lambda x: checkpoint(copied, x, use_reentrant=False), copied), x, upstream)
    assert all(torch.equal(one, other) for one, other in zip(run(fused, x, upstream), again, strict=True))


def lambda_module(forward, owner):
    module = nn.Module()
    module.owner, module.forward = owner, forward
    return module


def test_adapters_over_deep_rows_are_those_of_each_sequence_alone():
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(tiny_model(), config)
    (batch,) = pack(DEEP)
    truth = alone(model, batch)
    rows, attended, in_response = batch.padded()
    logits = model(input_ids=rows, attention_mask=attended).logits[:, :-1].log_softmax(-1)
    logits.gather(-1, rows[:, 1:, None])[..., 0][in_response[:, 1:].bool()].square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    attach_logprob_head(model)
    assert fuse_lora(model) == 7 * 3
    ours = model(packed=batch).logps
    torch.testing.assert_close(ours.double(), truth, atol=1e-5, rtol=0)
    ours.square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            close = 1e-5 * float(expected[name].abs().max())
            torch.testing.assert_close(parameter.grad, expected[name], atol=close, rtol=1e-4, msg=named(name))
    assert len(expected) == 2 * 7 * 3


def test_an_adapter_saved_from_fused_layers_is_pefts(tmp_path):
    from peft import PeftModel

    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(tiny_model(), config)
    assert fuse_lora(model) == fuse_lora(model) == 7 * 3
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    ids = torch.arange(10)[None]
    assert torch.allclose(model(ids).logits, loaded(ids).logits, atol=1e-6)
    assert torch.allclose(model.merge_and_unload()(ids).logits, loaded(ids).logits, atol=1e-5)


def test_the_trainer_fuses_its_adapters(tmp_path):
    trainer = make_trainer(tmp_path, peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert sum(isinstance(module, FusedLoraLinear) for module in trainer.model.modules()) == 7 * 3
