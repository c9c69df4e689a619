"""DPOTrainer and a checkpointed model on the CPU, and the same on a GPU: bfloat16, memory that runs out, max_tokens."""

import pytest
import torch

from dpofast import attach_logprob_head, pack, reference, sequence_logprobs
from dpofast.model.attention.interface import choose_attention
from dpofast.model.attention.layout import AttentionOptions
from dpofast.training.layers.compiled import decoder_layers
from tests.support.tiny import tiny_dataset, tiny_model, tiny_pairs
from tests.support.tiny_training import losses_of, make_trainer, weights_of

pytestmark = pytest.mark.slow(15)

# In float32, where micro-batches of other sizes change no loss by more than 1e-4; a GPU's default is bfloat16.
EXACT = {"optim": "sgd", "learning_rate": 0.1, "bf16": False}
# A width of heads that FlashAttention takes.
WIDE = {"hidden_size": 64}
# What bfloat16 may change of a loss; three times what a CPU's changes.
BFLOAT16_LOSS = 6e-3


def trainer_on(device, folder, *, model=None, **options):
    model = tiny_model(**WIDE) if model is None else model
    # Compiling the layers, a GPU's default, takes longer than most of what is tested here.
    options = {"torch_compile": False, **options}
    return make_trainer(folder, model=model, use_cpu=device.type == "cpu", **options)


def test_three_steps_in_bfloat16(tmp_path, device):
    exact = trainer_on(torch.device("cpu"), tmp_path, max_steps=3)
    exact.train()
    trainer = trainer_on(device, tmp_path, max_steps=3, bf16=True)
    before = weights_of(trainer)
    trainer.train()
    assert next(trainer.model.parameters()).device.type == device.type
    assert len(losses_of(trainer)) == 3
    assert losses_of(trainer) == pytest.approx(losses_of(exact), abs=BFLOAT16_LOSS)
    assert max(losses_of(exact)) - min(losses_of(exact)) > 4 * BFLOAT16_LOSS  # the steps move the loss by more
    assert (weights_of(trainer).cpu() - before.cpu()).abs().max() > 1e-3


def test_layers_that_are_compiled_by_default_train_the_same(tmp_path, device):
    """On a GPU with the default, on a CPU by the whole compiler but its code generation."""
    by_hand = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    compiled = {"torch_compile": None} if device.type == "cuda" else by_hand
    expected, trainer = (
        trainer_on(device, tmp_path, model=tiny_model(num_hidden_layers=1, **WIDE), max_steps=2, **EXACT, **options)
        for options in ({}, compiled)
    )
    layers = decoder_layers(trainer.model)
    assert layers and all(hasattr(layer, "_made_from") for layer in layers)
    for run in (expected, trainer):
        run.train()
    assert losses_of(trainer) == pytest.approx(losses_of(expected), abs=1e-4)


def gradients_of(model, logps):
    model.zero_grad()
    logps.sum().backward()
    return torch.cat([p.grad.double().flatten() for p in model.parameters()])


def test_heads_of_128_under_checkpointing_are_within_twice_the_frameworks_own_error(device):
    shape = {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
    exact = tiny_model(dtype=torch.float64, **shape).to(device)
    model = attach_logprob_head(tiny_model(dtype=torch.bfloat16, **shape).to(device)).train()
    exact.load_state_dict(model.state_dict())
    model.gradient_checkpointing_enable()
    query = torch.empty(1, 2, 8, 128, dtype=torch.bfloat16, device=device)
    assert choose_attention(query, query, AttentionOptions()).backend == {"cuda": "varlen", "cpu": "sdpa"}[device.type]
    (batch,) = pack(tiny_pairs(40))
    batch = batch.to(device)

    def padded(model):
        tokens = reference.padded_logprobs(model, *batch.padded(), use_cache=False)
        return reference.sequence_logprobs(tokens, batch.cu_targets)

    results = [
        (logps.detach().double(), gradients_of(of, logps))
        for of, logps in (
            (exact, padded(exact)),
            (model, padded(model)),
            (model, sequence_logprobs(model(packed=batch), batch)),
        )
    ]
    for truth, own, ours in zip(*results, strict=True):
        assert (ours - truth).norm() <= 2 * (own - truth).norm()


def test_auto_finds_max_tokens_and_changes_no_result(tmp_path, device):
    options = {"train": tiny_dataset(60), "max_steps": 3, **EXACT}
    expected = trainer_on(device, tmp_path, **options)
    trainer = trainer_on(device, tmp_path, max_tokens="auto", **options)
    assert trainer.max_tokens >= 1 and all(p.grad is None for p in trainer.model.parameters())
    for run in (expected, trainer):
        run.train()
    assert losses_of(trainer) == pytest.approx(losses_of(expected), abs=1e-4)


def test_a_step_that_the_allocator_refuses_is_done_again_in_smaller_parts(tmp_path, device):
    expected = trainer_on(device, tmp_path, **EXACT)
    expected.train()
    model, refused = tiny_model(**WIDE), []

    def allocate_too_much(module, args, kwargs):
        if module.training and kwargs["packed"].num_tokens > 25:
            refused.append(kwargs["packed"].num_tokens)
            torch.empty(2**50, dtype=torch.uint8, device=device)

    model.register_forward_pre_hook(allocate_too_much, with_kwargs=True)
    trainer = trainer_on(device, tmp_path, model=model, **EXACT)
    trainer.train()
    assert refused and trainer.max_tokens <= 25
    assert losses_of(trainer) == pytest.approx(losses_of(expected), abs=1e-4)
