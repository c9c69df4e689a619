"""torch_compile compiles the layers of a model, and neither the whole model nor anything of a batch's layout."""

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch._dynamo.utils import counters

from tests.support.tiny import tiny_dataset, tiny_model
from tests.support.tiny_training import losses_of, make_trainer, weights_of

pytestmark = pytest.mark.slow(90)

EAGER = {"torch_compile": True, "torch_compile_backend": "aot_eager"}  # all of the tracing, none of the C++
SGD = {"optim": "sgd", "learning_rate": 0.1}
SHORT = {"max_tokens": 40, **SGD}
CASES = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "padded": {"padded": True},
    "live reference": {"precompute_ref_log_probs": False},
    "lora": {"peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")},
}


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("case", CASES)
def test_a_compiled_run_is_the_same(case, tmp_path):
    plain, compiled = (make_trainer(tmp_path, **SHORT, **CASES[case], **options) for options in ({}, EAGER))
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


def test_what_cannot_be_compiled_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("dpofast.training.trainer.is_sharded", lambda accelerator: True)
        with pytest.raises(ValueError, match="torch_compile: expected a model that is whole on every rank"):
            make_trainer(tmp_path, **EAGER)
    monkeypatch.setattr("dpofast.training.prepare.GradientCheckpointingLayer", nn.Bilinear)
    with pytest.raises(ValueError, match="torch_compile: expected a model of transformers' repeated layers"):
        make_trainer(tmp_path, **EAGER)
    with pytest.raises(ValueError, match="model: expected a model, got torch.compile's wrapper"):
        make_trainer(tmp_path, model=torch.compile(tiny_model(), backend="eager"))
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(ValueError, match="dynamo_backend: expected no, got inductor: .* set torch_compile"):
        make_trainer(tmp_path)
