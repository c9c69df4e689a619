"""attach_logprob_head called again: numbers are compared again where another attention may run, and only there."""

import copy
import pickle

import pytest
import torch

from dpofast import attach_logprob_head, detach_logprob_head, pack
from dpofast.model.attention import interface as attention_interface
from dpofast.model.attention.sdpa import sdpa_attention
from dpofast.model.checks import parity
from dpofast.training.layers.compiled import compile_layers
from tests.support.families import family_model
from tests.support.tiny import tiny_model, tiny_pairs


@pytest.fixture
def calls(monkeypatch):
    """Counts attention calls of packed forwards, by the dtype of the queries."""
    seen = []

    def counted(query, *rest):
        seen.append(query.dtype)
        return sdpa_attention(query, *rest)

    monkeypatch.setitem(attention_interface._BACKENDS, "sdpa", counted)
    return seen


@pytest.fixture
def moved(monkeypatch):
    """Pretend that models take their ids on another device from now on; returns how."""

    def pretend():
        real = parity._setting
        monkeypatch.setattr(parity, "_setting", lambda model: ("cuda:0", *real(model)[1:]))

    return pretend


def break_attention(monkeypatch):
    """As a kernel would that reads the wrong rows."""

    def wrong(query, key, value, *rest):
        return sdpa_attention(query, key, value.flip(2) * 3, *rest)

    monkeypatch.setitem(attention_interface._BACKENDS, "sdpa", wrong)


def test_a_second_call_in_the_same_setting_computes_nothing(calls):
    model = attach_logprob_head(tiny_model())
    assert calls
    calls.clear()
    attach_logprob_head(model)
    attach_logprob_head(copy.deepcopy(model))
    attach_logprob_head(pickle.loads(pickle.dumps(model)))
    assert not calls
    attach_logprob_head(detach_logprob_head(model))
    assert calls


def test_another_device_or_dtype_is_checked_once(calls, moved):
    model = attach_logprob_head(tiny_model())
    calls.clear()
    attach_logprob_head(model.double())
    assert set(calls) == {torch.float64}
    calls.clear()
    attach_logprob_head(model)
    assert not calls
    moved()
    attach_logprob_head(model)
    assert calls
    calls.clear()
    attach_logprob_head(model)
    assert not calls


def test_an_attention_that_is_wrong_where_the_model_has_moved_is_refused_in_the_same_words(monkeypatch, moved):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    plain = type(model)
    attach_logprob_head(model)
    break_attention(monkeypatch)
    attach_logprob_head(model)  # not moved: nothing is compared
    moved()
    refusal = (
        r"LlamaForCausalLM cannot run packed: packed and padded log-probs of the same tokens differ by .*padded=True"
    )
    with pytest.raises(ValueError, match=refusal):
        attach_logprob_head(model)
    assert type(model) is plain
    with pytest.raises(ValueError, match=refusal):
        attach_logprob_head(model)


def test_the_trainer_checks_the_model_where_it_runs(monkeypatch, moved, tmp_path):
    from tests.support.tiny_training import make_trainer  # here: the tests of the GPU do without datasets

    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    attach_logprob_head(model)
    break_attention(monkeypatch)
    moved()
    with pytest.raises(ValueError, match="cannot run packed: packed and padded log-probs of the same tokens differ"):
        make_trainer(tmp_path, model=model)


def compile_each(model, backend):
    for layer in model.model.layers:
        layer.compile(backend=backend)


def compile_as_training_does(model, backend):
    compile_layers(model, backend=backend, mode=None, padded=False)


@pytest.mark.parametrize("compile_model", [compile_each, compile_as_training_does])
def test_compiled_layers_run_uncompiled_in_the_check_and_compiled_after_it(compile_model, moved):
    model = attach_logprob_head(tiny_model())
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    compile_model(model, backend)
    moved()
    attach_logprob_head(model)
    assert not compiled
    (batch,) = pack(tiny_pairs(2))
    model(packed=batch)
    assert compiled


@pytest.mark.parametrize("family", ["gemma2", "gpt-oss"])
def test_sixteen_bits_are_compared_in_float32_beside_flex(family, monkeypatch):
    """torch.compile cannot trace FlexAttention under the mode that widens: float32 goes by segments."""
    monkeypatch.setattr(attention_interface, "flex_refusal", lambda *_: None)
    dtypes = set()

    def flex(query, *rest):
        dtypes.add(query.dtype)
        return sdpa_attention(query, *rest)

    monkeypatch.setitem(attention_interface._BACKENDS, "flex", flex)
    attach_logprob_head(family_model(family).to(torch.bfloat16))
    assert dtypes == {torch.bfloat16}


@pytest.mark.gpu(twin="test_another_device_or_dtype_is_checked_once")
@pytest.mark.parametrize("autocast", [False, True])
def test_varlen_is_compared_on_the_device(autocast, device, monkeypatch):
    model = attach_logprob_head(tiny_model(dtype=torch.float32 if autocast else torch.bfloat16)).to(device)
    ran = []
    varlen = attention_interface._BACKENDS["varlen"]
    monkeypatch.setitem(attention_interface._BACKENDS, "varlen", lambda *inputs: ran.append(1) or varlen(*inputs))
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        attach_logprob_head(model)
        assert ran
        ran.clear()
        attach_logprob_head(model)
    assert not ran
