"""trl's DPOTrainer with and without patch_trl(): the same run, in every setting that trl has."""

import copy
import pickle

import pytest
import torch
import trl.trainer.dpo_trainer as trl_module
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from dpofast import attach_logprob_head, detach_logprob_head
from dpofast.integrations import trl as integration
from dpofast.integrations._trl.rows import ROWS_KEY
from dpofast.integrations.trl import patch_trl, report, unpatch_trl
from tests.support.tiny import SHAPE, VOCAB, tiny_model
from tests.support.trl_cases import assert_same_run, build, train

BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


@pytest.fixture(autouse=True)
def unpatched():
    """Whatever a test does, the next one meets trl as it is."""
    yield
    unpatch_trl()


def fused_call(model, rows=None, **options):
    """One fused forward on two pairs; the second has prompts of its own."""
    input_ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 9, 1, 0], [5, 6, 4, 1, 0], [8, 6, 9, 3, 1]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    labels = input_ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    if rows is not None:
        labels[rows] = -100
    return model(input_ids=input_ids, attention_mask=mask, labels=labels, fused_lm_head=True, **options)


def both_heads(model, level="forward", outputs=("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")):
    """The model under trl's fused head, and a copy under dpofast's."""
    ours = copy.deepcopy(model)
    trl_module.add_fused_lm_head(model, outputs=outputs)
    patch_trl(level=level)
    trl_module.add_fused_lm_head(ours, outputs=outputs)
    unpatch_trl()
    return model, ours


@pytest.mark.parametrize("level", ["forward", "kernel"])
@pytest.mark.parametrize("rows", [None, [1], [0, 1, 2, 3]], ids=["all", "one empty row", "no labels"])
def test_every_field_equals_trls(rows, level):
    theirs, ours = both_heads(tiny_model(), level)
    expected, got = fused_call(theirs, rows), fused_call(ours, rows)
    assert type(expected) is type(got) and expected.keys() == got.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=2e-6, rtol=1e-5)
    expected.log_probs.square().sum().backward()
    got.log_probs.square().sum().backward()
    for (name, wanted), parameter in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, wanted.grad, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize(
    "options",
    [{"final_logit_softcapping": 5.0, "attn_logit_softcapping": None}],
    ids=["gemma2"],
)
def test_a_family_that_changes_its_logits(options):
    torch.manual_seed(0)
    theirs, ours = both_heads(Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8, **options)))
    torch.testing.assert_close(fused_call(ours).log_probs, fused_call(theirs).log_probs, atol=1e-5, rtol=1e-5)


def test_only_what_is_read_is_computed():
    """The reference pass through a policy's adapters reads log-probs alone."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), LoraConfig(**LORA))
    patch_trl()
    trl_module.add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy"))
    assert fused_call(model).entropy is not None
    with torch.no_grad():
        assert fused_call(model).entropy is not None
        with model.disable_adapter():
            output = fused_call(model)
    assert output.entropy is None and output.log_probs is not None


def test_copies_pickles_and_generation(tmp_path):
    # checkpointing would leave a hook of transformers' own on the model that cannot be pickled
    trainer, _ = train(tmp_path, patched=True, max_steps=2, gradient_checkpointing=False)
    model = trainer.model.eval()
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        model.lm_head.weight *= 3.0  # a copy that ran the original's weights would notice
    for other in (copied, pickled):
        assert type(other) is type(model)
        assert (fused_call(other).log_probs - fused_call(model).log_probs).abs().max() > 1e-4
        torch.testing.assert_close(fused_call(other).log_probs, fused_call(copied).log_probs)
    prompt = torch.tensor([[5, 6, 7]])
    fast = copied.generate(prompt, max_new_tokens=6, do_sample=False)
    plain = tiny_model().eval()
    plain.load_state_dict(copied.state_dict())
    plain.generation_config = copied.generation_config
    assert torch.equal(fast, plain.generate(prompt, max_new_tokens=6, do_sample=False))
    torch.testing.assert_close(copied(prompt).logits, plain(prompt).logits)


def test_a_trained_model_is_saved_and_is_the_reference_of_the_next_run(tmp_path):
    first, _ = train(tmp_path / "first", patched=True, max_steps=2)
    first.save_model(tmp_path / "saved")
    saved = type(tiny_model()).from_pretrained(tmp_path / "saved")
    for name, value in saved.state_dict().items():
        assert torch.equal(value, first.model.state_dict()[name])
    # trl loads the reference of a patched model from its folder, with the attention implementation that the model has
    model = first.model
    model.config._name_or_path = str(tmp_path / "saved")
    patch_trl()
    trainer = build(tmp_path / "second", model=model, ref_model=None, max_steps=2)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_unpatching_restores_exactly(tmp_path):
    names = ("add_fused_lm_head", "DataCollatorForPreference")
    before = {name: getattr(trl_module, name) for name in names}
    patch_trl()
    patch_trl(level="kernel")  # a second call replaces the first
    assert all(getattr(trl_module, name) is not before[name] for name in names)
    unpatch_trl()
    unpatch_trl()
    assert {name: getattr(trl_module, name) for name in names} == before
    # a trainer that was built under the patch goes on, and its model can be trained by trl's own head again
    patch_trl()
    trainer = build(tmp_path / "a", max_steps=2)
    unpatch_trl()
    trainer.train()
    plain_class = type(tiny_model())
    detach_logprob_head(trainer.model)
    assert type(trainer.model) is plain_class
    build(tmp_path / "b", model=trainer.model, max_steps=1).train()


def test_the_rows_come_from_the_collator(tmp_path):
    patch_trl()
    trainer = build(tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    rows = batch[ROWS_KEY]
    assert rows.shape == tuple(batch["input_ids"].shape)
    assert [ids.tolist() for ids in rows.ids] == [
        row[mask == 1].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    # and without them the same is read from the tensors
    model = trainer.model.eval()
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    call = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
    with torch.no_grad():
        told = model(**call, fused_lm_head=True, **{ROWS_KEY: rows})
        read = model(**call, fused_lm_head=True)
    assert torch.equal(told.log_probs, read.log_probs)


def test_report_says_which_path_is_active_and_why(tmp_path):
    assert "not patched" in report()
    patch_trl()
    assert "fused_lm_head" in report() and "no model yet" in report()
    trainer = build(tmp_path, max_steps=2)
    trainer.train()
    assert report().count("model LlamaForCausalLM: packed") == 2 and "4 x packed" in report()
    patch_trl(level="kernel")
    build(tmp_path, max_steps=1).train()
    assert 'LlamaForCausalLM: padded, because level "kernel" was asked for' in report()


def test_a_model_that_cannot_be_packed(tmp_path):
    shape = {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    model = BloomForCausalLM(BloomConfig(**shape))
    patch_trl(on_unpackable="raise")
    with pytest.raises(ValueError, match=r"BloomForCausalLM: cannot run packed: its att.*on_unpackable=.kernel"):
        build(tmp_path, model=model)
    torch.manual_seed(0)
    plain = train(tmp_path / "plain", patched=False, model=copy.deepcopy(model), max_steps=4)
    patch_trl()
    with pytest.warns(UserWarning, match="BloomForCausalLM keeps trl's padded forward.*AttentionInterface"):
        trainer = build(tmp_path / "fast", model=copy.deepcopy(model), max_steps=4)
    trainer.train()
    for theirs, ours in zip(plain[0].state.log_history[:4], trainer.state.log_history[:4], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
    assert "BloomForCausalLM: padded, because its attention does not go through" in report()


def test_a_model_without_attention_gets_the_kernel():
    torch.manual_seed(0)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4))
    theirs, ours = both_heads(mamba, level="kernel")
    torch.testing.assert_close(fused_call(ours).log_probs, fused_call(theirs).log_probs, atol=1e-5, rtol=1e-5)


def test_a_head_that_scales_its_logits_unknown_to_dpofast():
    class Doubled(type(tiny_model())):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 2 * output.logits
            return output

    model = Doubled(tiny_model().config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    plain = type(model)
    for level in ("kernel", "forward"):
        patch_trl(level=level)
        with pytest.raises(ValueError, match="Doubled: log-probs .* scales its logits"):
            trl_module.add_fused_lm_head(model)
        assert type(model) is plain


def test_a_model_without_a_plain_head_is_refused():
    torch.manual_seed(0)
    model = tiny_model()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    for candidate, head in ((model, "Sequential"), (BertModel(BertConfig(**BERT)), "NoneType")):
        plain = type(candidate)
        patch_trl(level="kernel")
        with pytest.raises(ValueError, match=f"{plain.__name__}: expected a plain nn.Linear head, got {head}"):
            trl_module.add_fused_lm_head(candidate)
        assert type(candidate) is plain


def test_prompt_learning_adapters_are_not_packed(tmp_path):
    options = {"peft_config": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "max_steps": 3}
    plain = train(tmp_path / "plain", patched=False, gradient_checkpointing=False, **options)
    patch_trl(on_unpackable="raise")
    with pytest.raises(ValueError, match="LlamaForCausalLM: cannot run packed: it was given .*past_key_values"):
        build(tmp_path / "refused", gradient_checkpointing=False, **options).train()
    with pytest.warns(UserWarning, match="LlamaForCausalLM keeps trl's padded forward.*past_key_values"):
        fast = train(tmp_path / "fast", patched=True, gradient_checkpointing=False, **options)
    assert_same_run(plain, fast)


def test_neftune_draws_trls_noise(tmp_path):
    """The scale is alpha / sqrt(width * D) of the padded rows, and a prompt has other noise in each of its rows."""
    options = {"neftune_noise_alpha": 5.0, "max_steps": 3}
    plain = train(tmp_path / "plain", patched=False, **options)
    quiet = train(tmp_path / "quiet", patched=False, max_steps=3)
    with pytest.warns(UserWarning, match="keeps trl's padded forward.*NEFTune"):
        fast = train(tmp_path / "fast", patched=True, **options)
    assert_same_run(plain, fast)
    assert abs(plain[0].state.log_history[0]["logps/chosen"] - quiet[0].state.log_history[0]["logps/chosen"]) > 1e-3
    # the reference has no noise, and runs packed
    assert fast[0].ref_model._dpofast_fused.calls["packed"] == 3
    assert_same_run(plain, train(tmp_path / "kernel", patched=True, level="kernel", **options))
    patch_trl(on_unpackable="raise")
    with pytest.raises(ValueError, match="neftune_noise_alpha=.*cannot run packed: NEFTune"):
        build(tmp_path / "refused", precompute_ref_log_probs=True, **options)


def test_options_are_checked():
    with pytest.raises(ValueError, match="level: expected one of"):
        patch_trl(level="deep")
    with pytest.raises(ValueError, match="on_unpackable: expected one of"):
        patch_trl(on_unpackable="ignore")
    patch_trl()
    with pytest.raises(ValueError, match="expected outputs among .* got .'perplexity'"):
        trl_module.add_fused_lm_head(tiny_model(), outputs=("log_probs", "perplexity"))
    with pytest.raises(ValueError, match="cast_lm_head_to_fp32"):
        trl_module.add_fused_lm_head(tiny_model(), cast_lm_head_to_fp32=True)
    model = tiny_model()
    trl_module.add_fused_lm_head(model)
    with pytest.raises(ValueError, match="expected labels, got none or shift_labels"):
        model(input_ids=torch.ones(2, 3, dtype=torch.int64), fused_lm_head=True)
    with pytest.raises(ValueError, match="padded on the right"):
        ids = torch.tensor([[0, 5, 6], [4, 5, 6]])
        model(input_ids=ids, attention_mask=(ids > 0).long(), labels=ids, fused_lm_head=True)


def test_an_unknown_trl_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(trl_module, "add_fused_lm_head", lambda model, heads: None)
    with pytest.raises(ValueError, match=r"trl .*add_fused_lm_head.*differ from those that dpofast knows.*heads"):
        patch_trl()
    monkeypatch.delattr(trl_module, "add_fused_lm_head")
    monkeypatch.delattr(trl_module.DPOTrainer, "_compute_loss")
    with pytest.raises(ValueError, match="none of the seams that dpofast knows"):
        patch_trl()
    assert integration._patch is None


def test_a_head_attached_by_hand_makes_way():
    for padded in (False, True):
        model = attach_logprob_head(tiny_model(), padded=padded)
        theirs, ours = both_heads(tiny_model())[0], model
        patch_trl()
        trl_module.add_fused_lm_head(ours)
        torch.testing.assert_close(fused_call(ours).log_probs, fused_call(theirs).log_probs, atol=1e-5, rtol=1e-5)
        assert "1 x packed" in report()
        unpatch_trl()


@pytest.mark.parametrize("level", ["forward", "kernel"])
def test_a_head_that_is_trained_beside_an_adapter(level, tmp_path):
    """The policy has PEFT's copy of the head, and the reference, the adapter off, the original."""
    adapter = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    plain = train(tmp_path / "plain", patched=False, peft_config=adapter, max_steps=3)
    fast = train(tmp_path / "fast", patched=True, level=level, peft_config=adapter, max_steps=3)
    assert_same_run(plain, fast)
    assert any("lm_head" in name and gradient.abs().max() > 0 for name, gradient in fast[1].items())
