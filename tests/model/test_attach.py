"""model(packed=batch) against the same model's own padded forward with full logits."""

import copy
import pickle

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
)

from dpofast import (
    PreferenceLoss,
    attach_logprob_head,
    detach_logprob_head,
    pack,
    preference_loss,
    reference,
    sequence_logprobs,
)
from dpofast.model.attach import PackedPreference
from tests.support.deep_examples import DEEP
from tests.support.tiny import FAMILIES, VOCAB, tiny_model, tiny_pairs


def padded_truth(model, batch):
    """The reference's sequence log-probs of a batch, on padded rows and full logits."""
    return reference.sequence_logprobs(
        reference.padded_logprobs(model, *batch.padded(), use_cache=False), batch.cu_targets
    )


def gradients_of(model, logps, upstream):
    model.zero_grad()
    (logps * upstream).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def tolerance(device):
    """A GPU's float32 attention adds up in tensor cores, three TF32 products for one: not quite a CPU's accuracy."""
    return 1e-5 if device.type == "cpu" else 1e-4


GROUP = {
    "prompt_ids": [5, 6, 7],
    "branches": [[8, 9], [10], [8, 11, 12], [13, 14]],
    "pairs": [(a, b) for a in range(4) for b in range(a + 1, 4)],
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("attention", "checkpointing"),
    [("sdpa", None), ("eager", None), ("sdpa", {"use_reentrant": False}), ("eager", {"use_reentrant": True})],
    ids=["sdpa", "eager", "checkpointing", "reentrant checkpointing"],
)
def test_packed_equals_padded(family, attention, checkpointing, device):
    model = attach_logprob_head(tiny_model(family, attn_implementation=attention).to(device)).train()
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
    for batch in pack([*DEEP, *tiny_pairs()], max_tokens=90):
        batch, upstream = batch.to(device), torch.randn(batch.num_sequences).to(device)
        output = model(packed=batch)
        logps = sequence_logprobs(output, batch)
        ours = gradients_of(model, logps, upstream)
        truth = padded_truth(model, batch)
        theirs = gradients_of(model, truth, upstream)
        assert output.logps.shape == (batch.num_targets,)
        torch.testing.assert_close(logps, truth, atol=tolerance(device), rtol=1e-6)
        close = {"atol": tolerance(device), "rtol": tolerance(device)}
        for name, gradient in ours.items():
            torch.testing.assert_close(gradient, theirs[name], **close, msg=f"{family} {name}")


def test_float64_agrees_to_float64_accuracy():
    model = attach_logprob_head(tiny_model(dtype=torch.float64))
    (batch,) = pack(tiny_pairs())
    torch.testing.assert_close(
        sequence_logprobs(model(packed=batch), batch), padded_truth(model, batch), atol=1e-12, rtol=1e-12
    )


def test_bfloat16_is_within_twice_the_frameworks_own_error(device):
    exact = attach_logprob_head(tiny_model(dtype=torch.float64).to(device))
    model = attach_logprob_head(tiny_model(dtype=torch.bfloat16).to(device))
    exact.load_state_dict(model.state_dict())
    (batch,) = pack(tiny_pairs(40))
    batch = batch.to(device)
    truth = padded_truth(exact, batch)
    own = (padded_truth(model, batch).double() - truth).abs().mean()
    ours = (sequence_logprobs(model(packed=batch), batch).double() - truth).abs().mean()
    assert ours <= 2 * own


def test_sharing_prompts_changes_no_number():
    model = attach_logprob_head(tiny_model())
    examples = tiny_pairs()
    (shared,), (apart,) = pack(examples), pack(examples, share_prompts=False)
    assert shared.num_tokens < apart.num_tokens
    torch.testing.assert_close(
        sequence_logprobs(model(packed=shared), shared)[shared.pairs.long()],
        sequence_logprobs(model(packed=apart), apart)[apart.pairs.long()],
    )


def test_every_other_call_is_unchanged(tmp_path):
    plain, model = tiny_model(), attach_logprob_head(tiny_model())
    ids, mask = torch.randint(0, VOCAB, (2, 7)), torch.ones(2, 7, dtype=torch.int64)
    mask[0, :3] = 0
    assert torch.equal(plain(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        plain.generate(ids, attention_mask=mask, **options), model.generate(ids, attention_mask=mask, **options)
    )
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(plain) and loaded.config._attn_implementation == "sdpa"
    assert torch.equal(loaded(ids).logits, plain(ids).logits)


def test_copies_run_their_own_weights():
    model = attach_logprob_head(tiny_model())
    (batch,) = pack(tiny_pairs())
    before = model(packed=batch).logps
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.5)
    assert torch.equal(model(packed=batch).logps, before)
    assert not torch.allclose(copied(packed=batch).logps, before)
    assert torch.equal(pickle.loads(pickle.dumps(model))(packed=batch).logps, before)


@pytest.mark.parametrize("change", ["set_attn_implementation", "config"])
def test_packed_attention_outlives_another_attention_implementation(change):
    model, ids = attach_logprob_head(tiny_model()), torch.arange(3, 9)[None]
    (batch,) = pack(tiny_pairs())
    truth = tiny_model()
    truth.set_attn_implementation("eager")
    expected = reference.padded_logprobs(truth, *batch.padded(), use_cache=False)
    if change == "config":
        model.config._attn_implementation = "eager"
    else:
        model.set_attn_implementation("eager")
    torch.testing.assert_close(model(packed=batch).logps, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(model(ids).logits, truth(ids).logits)
    assert detach_logprob_head(model).config._attn_implementation == "eager"


def test_attach_and_detach_are_idempotent():
    model = tiny_model()
    original = type(model)
    assert attach_logprob_head(attach_logprob_head(model)) is model
    assert detach_logprob_head(detach_logprob_head(model)) is model
    assert type(model) is original and model.config._attn_implementation == "sdpa"


def test_statistics_come_out_per_target():
    model = attach_logprob_head(tiny_model())
    (batch,) = pack(tiny_pairs())
    output = model(packed=batch, stats=("entropy", "is_top1"))
    assert output.entropy.shape == output.is_top1.shape == (batch.num_targets,)
    assert output.mean_logits is None
    assert (output.entropy > 0).all() and (output.entropy <= torch.log(torch.tensor(float(VOCAB)))).all()


def test_peft_adapter_trains_through_the_packed_forward():
    from peft import LoraConfig, get_peft_model

    base = tiny_model()
    model = attach_logprob_head(
        get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    )
    (batch,) = pack(tiny_pairs())
    sequence_logprobs(model(packed=batch), batch).sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)
    assert base.get_output_embeddings().weight.grad is None


def test_an_adapter_on_the_head_is_refused():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"plain nn.Linear head.*leave the head out"):
        attach_logprob_head(model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)),
            "BertModel: expected a",
        ),
        (
            lambda: T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_ff=16, num_layers=1, num_heads=2)),
            "T5ForConditionalGeneration: expected a decoder-only",
        ),
        (lambda: torch.nn.Linear(2, 2), "Linear: expected a transformers causal language model"),
        (lambda: tiny_model().model, "LlamaModel: expected a model with its language-modelling head, and this one has"),
    ],
    ids=["bert", "t5", "no-model", "backbone"],
)
def test_what_is_no_decoder_is_refused_by_name(make, message):
    model = make()
    original = type(model)
    with pytest.raises(ValueError, match=message):
        attach_logprob_head(model)
    assert type(model) is original


@pytest.mark.parametrize("rate", [None, -0.5, 1.5])
@pytest.mark.parametrize("padded", [False, True])
def test_a_rate_of_dropout_that_is_none_is_refused_by_name(rate, padded):
    model = tiny_model(attention_dropout=rate)
    message = rf"between 0 and 1 as model\.layers\.0\.self_attn\.attention_dropout, got {rate}: correct its config"
    with pytest.raises(ValueError, match=message):
        attach_logprob_head(model, padded=padded)


def test_log_probs_in_the_place_of_the_output_are_refused():
    (batch,) = pack(tiny_pairs(2))
    output = attach_logprob_head(tiny_model())(packed=batch)
    with pytest.raises(TypeError, match=r"expected the LogprobOutput of model\(packed=batch\), got Tensor"):
        sequence_logprobs(output.logps, batch)


def test_a_twist_that_only_the_numbers_show_is_refused():
    class Twisted(type(tiny_model())):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 3
            return output

    model = tiny_model()
    model.__class__ = Twisted
    with pytest.raises(ValueError, match="Twisted cannot run packed: packed and padded log-probs .* differ by"):
        attach_logprob_head(model)
    assert type(model) is Twisted and model.config._attn_implementation == "sdpa"


def test_further_inputs_beside_packed_are_refused():
    model = attach_logprob_head(tiny_model())
    (batch,) = pack(tiny_pairs())
    with pytest.raises(ValueError, match="expected no further model inputs, got \\['labels'\\]"):
        model(packed=batch, labels=batch.targets)


def test_the_whole_loss_in_one_pass_equals_the_two_steps(device):
    model = attach_logprob_head(tiny_model("llama-tied").to(device))
    (batch,) = pack([*tiny_pairs(), GROUP])
    batch, ref_logps = batch.to(device), -10 * torch.rand(batch.num_sequences).to(device)
    loss = PreferenceLoss(beta=0.3, label_smoothing=0.1)
    whole = model(packed=batch, preference=PackedPreference(ref_logps, loss, 20))
    whole.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logps = sequence_logprobs(model(packed=batch), batch)
    steps = preference_loss(logps, batch.pairs, ref_logps, loss=loss, num_pairs=20)
    steps.loss.backward()
    torch.testing.assert_close(whole.loss, steps.loss)
    torch.testing.assert_close(whole.rewards, steps.rewards)
    for name, parameter in model.named_parameters():
        close = {"atol": tolerance(device) / 10, "rtol": tolerance(device)}
        torch.testing.assert_close(gradients[name], parameter.grad, **close, msg=name)
    with pytest.raises(ValueError, match="stats: expected none beside preference"):
        model(packed=batch, stats=("entropy",), preference=PackedPreference(ref_logps, loss, 20))


@pytest.mark.parametrize("padded", [False, True])
def test_a_prompt_id_outside_the_vocabulary_is_named(padded):
    model = attach_logprob_head(tiny_model(), padded=padded)
    (batch,) = pack([{"prompt_ids": [3, 97], "chosen_ids": [4], "rejected_ids": [5, 6]}])
    with pytest.raises(ValueError, match="packed: expected token ids below the model's vocabulary of 97, got 97"):
        model(packed=batch)


def test_weights_that_are_not_finite_are_refused_as_such():
    model = tiny_model()
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(ValueError, match="LlamaForCausalLM: its own log-probs are not finite"):
        attach_logprob_head(model)


def test_what_is_no_batch_of_the_model_is_refused():
    model = attach_logprob_head(tiny_model())
    batches = pack(tiny_pairs(4), max_tokens=30)
    assert len(batches) > 1
    with pytest.raises(TypeError, match="expected a PackedBatch, got a list: call it once for each batch"):
        model(packed=batches)
    with pytest.raises(ValueError, match="output: expected .* log-probs, one a target, got"):
        sequence_logprobs(model(packed=batches[0]), pack(tiny_pairs(4))[0])
