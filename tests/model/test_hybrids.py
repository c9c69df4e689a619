"""Hybrid models packed: recurrent layers follow the branches of a row, whatever is shared and however it is run."""

import copy
import functools
import gc
import importlib.util
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from dpofast import attach_logprob_head, detach_logprob_head, pack, reference
from dpofast.model.recurrent.follow import follow_segments
from tests.support.families import HYBRIDS, family_model
from tests.support.tiny import SHAPE, VOCAB, tiny_pairs
from tests.support.tiny_training import losses_of, make_trainer, weights_of

pytestmark = pytest.mark.slow(60)

# One of each way to hook: the gated delta rule, Kimi Delta Attention, Mamba2, Mamba2 inside attention, convolutions.
KINDS = ["qwen3.5", "kimi-linear", "mamba2", "falcon-h1", "lfm2"]
# Families that no test keeps attached, and their modules.
HOOKED = {
    "qwen3-next": transformers.models.qwen3_next.modeling_qwen3_next,
    "bailing-hybrid": transformers.models.bailing_hybrid.modeling_bailing_hybrid,
    "zamba2": transformers.models.zamba2.modeling_zamba2,
}


def levels(batch):
    """The most segments on a path."""
    depths = []
    for parent in batch.segments.parents.tolist():
        depths.append(1 if parent < 0 else depths[parent] + 1)
    return max(depths)


def forks():
    """Prompts that share a system prompt and turns, and responses that fork late: two groups of four, one of two."""
    draw = torch.Generator().manual_seed(3)
    system, turn, answer, *ends = (
        torch.randint(8, VOCAB, (n,), generator=draw).tolist() for n in (9, 4, 5, 3, 1, 6, 2)
    )
    responses = [[3, *answer, *end] for end in ends[:2]] + [[3, *answer[:2], 4, *ends[2]], [4, *ends[3]]]
    pairs = [(0, 1), (1, 2), (2, 3), (0, 3)]
    return [
        {"prompt_ids": [*system, 5, *turn], "branches": responses, "pairs": pairs},
        {"prompt_ids": [*system, 5, *turn, *responses[0], 6], "branches": responses, "pairs": pairs},
        {"prompt_ids": [*system, 7], "branches": responses[2:], "pairs": [(0, 1)]},
    ]


def gradients(model, logps):
    model.zero_grad()
    upstream = torch.linspace(-1, 1, len(logps))
    (logps * upstream).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def truth_of(model, batch):
    return reference.padded_logprobs(model, *batch.padded(), use_cache=False)


def assert_equals_the_truth(model, batch):
    ours, theirs = model(packed=batch).logps, truth_of(model, batch)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    expected = gradients(model, theirs)
    got = gradients(model, model(packed=batch).logps)
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        close = 1e-5 * max(1.0, float(expected[name].abs().max()))
        torch.testing.assert_close(gradient, expected[name], atol=close, rtol=0, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize("family", HYBRIDS)
def test_forks_inside_prompts_and_responses_change_no_number(family):
    (batch,) = pack(forks())
    assert levels(batch) >= 5
    assert_equals_the_truth(attach_logprob_head(family_model(family)), batch)


@functools.cache
def attached(family):
    return attach_logprob_head(family_model(family))


ids = st.lists(st.integers(3, 5), min_size=1, max_size=10)


@pytest.mark.parametrize("family", KINDS)
@settings(max_examples=25, deadline=None)
@given(prompts=st.lists(ids, min_size=1, max_size=4), responses=st.lists(ids, min_size=2, max_size=6, unique_by=tuple))
def test_any_trie_gives_each_sequence_the_log_probs_it_has_alone(family, prompts, responses):
    pairs = [(0, other) for other in range(1, len(responses))]
    (batch,) = pack([{"prompt_ids": prompt, "branches": responses, "pairs": pairs} for prompt in prompts])
    with torch.no_grad():
        ours = attached(family)(packed=batch).logps
        torch.testing.assert_close(ours, truth_of(attached(family), batch), atol=1e-5, rtol=0)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", HYBRIDS)
def test_checkpointed_layers_follow_the_branches_again(family, reentrant):
    model = attach_logprob_head(family_model(family)).train()
    (batch,) = pack(forks())
    expected = gradients(model, model(packed=batch).logps)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = gradients(model, model(packed=batch).logps)
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", KINDS)
def test_adapters_on_the_projections_of_recurrent_layers_are_trained(family):
    targets = r".*\.(in_proj|in_proj_qkv|in_proj_b|q_proj|f_b_proj)"
    model = get_peft_model(family_model(family), LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    attach_logprob_head(model)
    (batch,) = pack(forks())
    assert_equals_the_truth(model, batch)
    recurrent = [name for name, p in model.named_parameters() if "lora_B" in name and ".layers.0." in name]
    assert recurrent and all(model.get_parameter(name).grad.abs().sum() > 0 for name in recurrent)


TRAINED = {
    "in parts": {"max_tokens": 40},
    "checkpointing": {"gradient_checkpointing": True},
    "lora": {},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
}


@pytest.mark.parametrize("case", TRAINED)
@pytest.mark.parametrize("family", ["qwen3.5", "kimi-linear", "nemotron-h", "falcon-h1", "lfm2-moe"])
def test_three_steps_train_the_weights_that_padded_rows_train(family, case, tmp_path):
    if case == "compiled" and family == "falcon-h1":
        with pytest.raises(ValueError, match="FalconH1ForCausalLM has none, or none but recurrent ones"):
            make_trainer(tmp_path, model=family_model(family), **TRAINED[case]).train()
        return
    start, runs = family_model(family), []
    for options in (TRAINED[case], {"padded": True}):
        targets = "(in_proj.*|q_proj|up_proj)"
        adapter = LoraConfig(r=4, target_modules=f".*\\.{targets}", task_type="CAUSAL_LM") if case == "lora" else None
        given = {"optim": "sgd", "router_aux_loss_coef": 0.0, "peft_config": adapter, **options}
        runs.append(make_trainer(tmp_path, model=family_model(family), **given))
        runs[-1].train()
        assert runs[-1].state.global_step == 3
    packed, padded = runs
    assert losses_of(packed) == pytest.approx(losses_of(padded), abs=1e-5)
    torch.testing.assert_close(weights_of(packed), weights_of(padded), atol=1e-5, rtol=0)
    trained = {name for name, p in packed.model.named_parameters() if p.requires_grad}
    assert any(".layers.0." in name for name in trained)
    if case != "lora":
        assert not torch.allclose(weights_of(packed), torch.cat([p.detach().flatten() for p in start.parameters()]))


def test_copies_follow_branches_after_their_original_is_detached():
    model = attach_logprob_head(family_model("qwen3.5"))
    (batch,) = pack(forks())
    expected = model(packed=batch).logps
    copied, pickled = copy.deepcopy(model), pickle.dumps(model)
    detach_logprob_head(model)
    assert torch.equal(copied(packed=batch).logps, expected)
    detach_logprob_head(copied)
    unpickled = pickle.loads(pickled)
    assert torch.equal(unpickled(packed=batch).logps, expected)
    for each in (copied, detach_logprob_head(unpickled)):
        assert not any(module._forward_pre_hooks for module in each.modules())


def is_hooked(family):
    gc.collect()  # models of other tests
    return "tree_recurrence" in HOOKED[family].causal_conv1d_fn.__code__.co_filename


@pytest.mark.parametrize("family", HOOKED)
def test_the_last_model_of_a_class_to_be_detached_takes_the_hooks_off(family):
    one, other = (attach_logprob_head(family_model(family)) for _ in range(2))
    (batch,) = pack(forks())
    expected = other(packed=batch).logps
    detach_logprob_head(one)
    assert torch.equal(other(packed=batch).logps, expected)
    assert is_hooked(family)
    detach_logprob_head(other)
    assert not is_hooked(family)


@pytest.mark.parametrize("family", KINDS)
def test_plain_calls_of_an_attached_model_are_unchanged(family):
    ids, model = torch.arange(3, 12)[None], family_model(family)
    before, generated = model(ids).logits, model.generate(ids, max_new_tokens=3, do_sample=False)
    attach_logprob_head(model)
    assert torch.equal(model(ids).logits, before)
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), generated)
    assert torch.equal(detach_logprob_head(model)(ids).logits, before)


@pytest.mark.parametrize("family", sorted({"qwen3.5", "falcon-h1", "lfm3"} & HYBRIDS.keys()))
def test_threads_with_batches_of_their_own_get_what_one_caller_gets(family):
    model = attach_logprob_head(family_model(family))
    batches = [pack(tiny_pairs(3, seed) + forks()[seed % 3 :])[0] for seed in range(6)]
    with torch.no_grad():
        expected = [model(packed=batch).logps for batch in batches]

    @torch.no_grad()
    def logps(batch):
        return model(packed=batch).logps

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(6) as pool:
            together = list(pool.map(logps, batches * 4))
    finally:
        sys.setswitchinterval(interval)
    for got, alone in zip(together, expected * 4, strict=True):
        torch.testing.assert_close(got, alone, atol=1e-6, rtol=0)


def test_hooks_that_give_wrong_numbers_are_refused_and_taken_off(monkeypatch):
    gc.collect()  # a model of another test would keep its hooks
    monkeypatch.setattr("dpofast.model.forward.segment_arguments", lambda model, segments: {})
    with pytest.raises(ValueError, match=r"Zamba2ForCausalLM cannot run packed: packed and padded log-probs.*padded=T"):
        attach_logprob_head(family_model("zamba2"))
    assert not is_hooked("zamba2")


def test_an_attention_that_sees_no_layout_is_refused():
    model = family_model("qwen3.5")
    attention = model.model.layers[1].self_attn
    forward = attention.forward
    attention.forward = lambda **given: forward(**{**given, "attention_mask": None, "packed_layout": None})
    with pytest.raises(ValueError, match="cannot run packed: 0 of its 1 attention calls saw the packed layout"):
        attach_logprob_head(model)


def test_without_the_package_a_hybrid_is_refused_with_its_name(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "dpofast.model.recurrent.follow.find_spec", lambda name: None if name == "tree_recurrence" else found(name)
    )
    model = family_model("lfm2")
    with pytest.raises(ValueError, match=r"is not installed: pip install 'dpofast\[hybrid\]'\. Padded rows do without"):
        attach_logprob_head(model)
    attach_logprob_head(model, padded=True)
    attach_logprob_head(family_model("llama"))


def test_layers_that_only_know_boundaries_are_packed_without_sharing(monkeypatch):
    import tree_recurrence

    install = tree_recurrence.install

    def chains(model):
        return tree_recurrence.Support("chains", "it knows boundaries", install(model).owners)

    monkeypatch.setattr(tree_recurrence, "install", chains)
    model = attach_logprob_head(family_model("qwen3.5"))
    (batch,) = pack([*forks(), *tiny_pairs(3)])
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
    with torch.no_grad():
        packed = model(packed=batch).logps
    assert seen == [int(batch.lengths().sum()) - batch.num_sequences]
    torch.testing.assert_close(packed, truth_of(model, batch), atol=1e-5, rtol=0)


def test_the_language_model_of_a_hybrid_composite_follows_branches():
    text = {**SHAPE, "num_hidden_layers": 2, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
            "linear_value_head_dim": 8}  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen3_5Config(
        text_config=text, vision_config=vision, image_token_id=90, video_token_id=91, vision_start_token_id=92,
        vision_end_token_id=93,
    )  # fmt: skip
    model = attach_logprob_head(transformers.Qwen3_5ForConditionalGeneration(config).eval())
    (batch,) = pack([e for e in tiny_pairs(6) if not {90, 91} & {i for part in e.values() for i in part}])
    torch.testing.assert_close(model(packed=batch).logps, truth_of(model, batch), atol=1e-5, rtol=0)


def test_a_model_without_recurrent_layers_is_not_touched():
    model = family_model("llama")
    before = set(vars(model))
    follow_segments(model)
    assert set(vars(model)) == before
