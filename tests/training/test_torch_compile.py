"""torch_compile compiles the layers of a model, and neither the whole model nor anything of a batch's layout."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from dpofast import DPOConfig, attach_logprob_head, pack
from dpofast.training.checks.device import device_notes
from dpofast.training.layers import choose
from dpofast.training.layers.compiled import compile_layers, decoder_layers
from tests.support.alone import alone
from tests.support.deep_examples import DEEP
from tests.support.families import family_model
from tests.support.tiny import SHAPE, tiny_dataset, tiny_model, tiny_pairs
from tests.support.tiny_training import losses_of, make_trainer, weights_of

pytestmark = pytest.mark.slow(90)

EAGER = {"torch_compile": True, "torch_compile_backend": "aot_eager"}  # all of the tracing, none of the C++
SGD = {"optim": "sgd", "learning_rate": 0.1}
SHORT = {"max_tokens": 40, **SGD}
CASES = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "padded": {"padded": True},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "live reference": {"precompute_ref_log_probs": False},
    "mixture of experts": {"model": "mixtral", "router_aux_loss_coef": 0.1},
    "lora": {"peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")},
}


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("case", CASES)
def test_a_compiled_run_is_the_same(case, tmp_path):
    given = {**CASES[case]}
    family = given.pop("model", "llama")
    plain, compiled = (
        make_trainer(tmp_path, **{**SHORT, **given, **options}, model=tiny_model(family)) for options in ({}, EAGER)
    )
    for trainer in (plain, compiled):
        trainer.train()
    assert counters["stats"]["unique_graphs"] > 0
    assert losses_of(compiled) == pytest.approx(losses_of(plain), abs=1e-5)
    torch.testing.assert_close(weights_of(compiled), weights_of(plain), atol=1e-5, rtol=1e-4)


def test_inductor_is_the_default(tmp_path):
    plain, compiled = (make_trainer(tmp_path, **SGD, max_steps=1, torch_compile=on) for on in (False, True))
    for trainer in (plain, compiled):
        trainer.train()
    assert counters["inductor"]
    torch.testing.assert_close(weights_of(compiled), weights_of(plain), atol=1e-5, rtol=1e-4)


def test_graphs_grow_neither_with_layers_nor_with_batches(tmp_path):
    graphs = []
    for layers, steps in ((3, 4), (10, 8)):
        torch.compiler.reset()
        counters.clear()
        model = tiny_model(num_hidden_layers=layers)
        make_trainer(tmp_path, model=model, train=tiny_dataset(40), max_steps=steps, **SHORT, **EAGER).train()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0


class Counted:
    """A backend that counts the calls of what it compiled, in the forward and later."""

    def __init__(self):
        self.graphs, self.calls = 0, 0

    def __deepcopy__(self, memo):
        return self

    def __call__(self, graph, inputs):
        self.graphs += 1
        compiled = aot_eager(graph, inputs)

        def run(*args):
            self.calls += 1
            return compiled(*args)

        return run


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_checkpointed_layers_run_compiled_forward_and_again_in_the_backward(family):
    """In transformers 5.23 a layer checkpoints inside its forward, where torch.compile leaves all of it uncompiled."""
    torch.manual_seed(0)
    model = tiny_model() if family == "llama" else Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=8))
    backend = Counted()
    compile_layers(attach_logprob_head(model), backend=backend, mode=None, padded=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    counters.clear()
    model.train()
    for count in range(4, 12):
        (batch,) = pack(tiny_pairs(count, seed=count))
        output = model(packed=batch).logps.sum()
        forward, backend.calls = backend.calls, 0
        output.backward()
        assert forward == backend.calls == 4 * len(decoder_layers(model))  # the backward runs the forward again
        backend.calls = 0
    # norm, projections and rotary, output projection, residual and MLP: of one length, and of all others
    assert backend.graphs == counters["stats"]["unique_graphs"] == 8
    (reason,) = counters["graph_break"]  # the one break is on purpose
    assert "torch.compiler.disable" in reason and "_counted" in reason


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_over_deep_rows_give_each_sequence_alone(checkpointing):
    model, gradients = tiny_model(), []
    (batch,) = pack(DEEP)
    truth = alone(model, batch)
    attach_logprob_head(model).train()
    for compiled in (False, True):
        if compiled:
            compile_layers(model, backend="aot_eager", mode=None, padded=False)
            if checkpointing:
                model.gradient_checkpointing_enable()
        model.zero_grad()
        logps = model(packed=batch).logps
        torch.testing.assert_close(logps.double(), truth, atol=1e-5, rtol=0)
        logps.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert counters["stats"]["unique_graphs"] > 0
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["diffllama", "gpt-j"])
def test_layers_with_constants_of_their_own_and_layers_without_keywords_are_recomputed_compiled(family):
    model, backend = family_model(family), Counted()
    (batch,) = pack(tiny_pairs(6))
    plain = attach_logprob_head(family_model(family)).train()
    plain(packed=batch).logps.sum().backward()
    compile_layers(attach_logprob_head(model), backend=backend, mode=None, padded=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()(packed=batch).logps.sum().backward()
    assert backend.calls > 0
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_plain_calls_copies_and_names_stay(tmp_path):
    model, backend = tiny_model(), Counted()
    names = list(model.state_dict())
    plain = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, do_sample=False)
    compile_layers(attach_logprob_head(model), backend=backend, mode=None, padded=False)
    assert torch.equal(model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, do_sample=False), plain)
    assert backend.graphs == 0 and list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    (batch,) = pack(tiny_pairs(4))
    expected = model(packed=batch).logps
    compiled = backend.calls
    assert compiled > 0 and torch.equal(copy.deepcopy(model)(packed=batch).logps, expected)
    assert backend.calls == 2 * compiled
    again = tiny_model()
    compile_layers(attach_logprob_head(again), backend="aot_eager", mode=None, padded=False)
    assert torch.equal(pickle.loads(pickle.dumps(again))(packed=batch).logps, again(packed=batch).logps)


def test_hooks_inside_a_compiled_layer_still_run():
    model, seen = tiny_model(), []
    compile_layers(attach_logprob_head(model), backend="aot_eager", mode=None, padded=False)
    for layer in decoder_layers(model):
        layer.self_attn.register_forward_hook(lambda module, args, output: seen.append(module.layer_idx))
        layer.register_forward_pre_hook(lambda module, args: seen.append("layer"))
    model(packed=pack(tiny_pairs(4))[0])
    assert seen == ["layer", 0, "layer", 1, "layer", 2]


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_compiler_that_fails_says_how_to_do_without_and_runs_nothing_uncompiled(where, tmp_path):
    def broken(graph, inputs):
        if where == "forward":
            raise OSError("no C compiler here")

        def no_backward(graph, inputs):
            raise TorchDynamoException("no C compiler here")  # as inductor's errors are

        return aot_autograd(fw_compiler=lambda graph, inputs: graph.forward, bw_compiler=no_backward)(graph, inputs)

    trainer = make_trainer(tmp_path, ref_model=tiny_model(), precompute_ref_log_probs=False)
    compile_layers(trainer.model, backend=broken, mode=None, padded=False)
    with pytest.raises(
        RuntimeError, match="torch_compile: the model's layers could not be compiled(?s:.*)no C compiler"
    ):
        trainer.train()
    assert trainer.state.global_step == 0


# ---- the default ----------------------------------------------------------------------------------------------------


def arguments(tmp_path, **options):
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)
    facts = {name: getattr(args, name) for name in vars(args) if not name.startswith("_")}
    return SimpleNamespace(**{**facts, "device": torch.device("cuda", 0)})


def test_layers_are_compiled_by_default_on_a_gpu_and_it_is_said(tmp_path):
    model = attach_logprob_head(tiny_model())
    args = arguments(tmp_path)
    assert args.torch_compile is None
    said = choose.compile_chosen([model], args)
    assert said.startswith("layers are compiled") and "torch_compile=False" in said
    assert all(isinstance(layer, LlamaDecoderLayer) for layer in decoder_layers(model))
    assert not any(type(layer) is LlamaDecoderLayer for layer in decoder_layers(model))
    assert device_notes(args, model, said)[-1] == said
    args.torch_compile = False  # of a second trainer
    assert choose.compile_chosen([model], args) is None
    assert all(type(layer) is LlamaDecoderLayer for layer in decoder_layers(model))


@pytest.mark.parametrize(
    ("options", "change", "reason"),
    [
        ({"torch_compile": False}, None, None),
        ({"use_liger_kernel": True}, None, None),
        ({"padded": True}, None, "padded rows"),
        ({}, lambda model: setattr(model, "is_quantized", True), "quantized"),
        ({}, lambda model: setattr(model.model.layers[1], "_hf_hook", None), "accelerate's hooks"),
    ],
)
def test_where_layers_are_not_compiled_by_default(options, change, reason, tmp_path):
    model = tiny_model()
    if change is not None:
        change(model)
    classes = [type(layer) for layer in decoder_layers(model)]
    said = choose.compile_chosen([model], arguments(tmp_path, **options))
    assert said is None if reason is None else "layers are not compiled: " in said and reason in said
    assert [type(layer) for layer in decoder_layers(model)] == classes


def test_sharding_leaves_layers_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert choose.not_by_default([tiny_model()], arguments(tmp_path)) == "the model is sharded"


def test_a_cpu_run_is_not_compiled_and_says_nothing(tmp_path, capsys):
    trainer = make_trainer(tmp_path)
    assert trainer.args.torch_compile is None and not counters["stats"]
    assert "compiled" not in capsys.readouterr().err


def test_the_compiler_changes_no_precision(tmp_path, monkeypatch):
    """TrainingArguments would turn on TF32 for all products of float32."""
    monkeypatch.setattr("transformers.training_args.is_torch_tf32_available", lambda: True)
    monkeypatch.setattr("transformers.training_args.enable_tf32", lambda on: pytest.fail("TF32"))
    for options in ({"torch_compile": True}, {"torch_compile_mode": "default"}, {"torch_compile_backend": "aot_eager"}):
        args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)
        assert args.torch_compile is True
        assert {name: getattr(args, name) for name in options} == options


def test_what_cannot_be_compiled_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("dpofast.training.layers.choose.will_shard", lambda args: True)
        with pytest.raises(ValueError, match="torch_compile: expected a model that is whole on every rank"):
            make_trainer(tmp_path, **EAGER)
    monkeypatch.setattr("dpofast.training.layers.compiled.GradientCheckpointingLayer", nn.Bilinear)
    with pytest.raises(ValueError, match="torch_compile: expected a model of transformers' repeated layers"):
        make_trainer(tmp_path, **EAGER)
    with pytest.raises(ValueError, match="model: expected a model, got torch.compile's wrapper"):
        make_trainer(tmp_path, model=torch.compile(tiny_model(), backend="eager"))
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(ValueError, match="dynamo_backend: expected no, got inductor: .* set torch_compile"):
        make_trainer(tmp_path)
