"""DPOTrainer and trl's patched trainer on a model that another training or accelerate has wrapped already."""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate import dispatch_model
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.models.llama import modeling_llama
from triton.runtime.interpreter import GridExecutor

from dpofast import attach_logprob_head, pack
from dpofast.training.layers import liger
from tests.support.composites import tiny_composite
from tests.support.tiny import tiny_model, tiny_pairs
from tests.support.tiny_training import losses_of, make_trainer, weights_of

LORA = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)


def after_training(model, tmp_path):
    """One step of a Trainer in bfloat16, at learning rate 0, so that the weights stay."""
    rows = Dataset.from_dict({"input_ids": [[5, 6]] * 2, "labels": [[5, 6]] * 2})
    options = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    args = TrainingArguments(str(tmp_path / "sft"), max_steps=1, bf16=True, learning_rate=0.0, **options)
    Trainer(model=model, args=args, train_dataset=rows).train()
    assert "forward" in vars(model)
    return model


def after_dpo(model, tmp_path):
    """Another DPO run in bfloat16, at learning rate 0."""
    make_trainer(tmp_path / "first", model=model, bf16=True, learning_rate=0.0, max_steps=1).train()
    assert "forward" in vars(model)
    return model


def adapted():
    torch.manual_seed(0)
    return get_peft_model(tiny_model(), LORA)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("make", [tiny_model, adapted])
@pytest.mark.parametrize("trained", [after_training, after_dpo])
def test_dpo_after_another_training_is_dpo_on_a_fresh_model(trained, make, bf16, tmp_path):
    fresh = make_trainer(tmp_path / "fresh", model=make(), bf16=bf16)
    again = make_trainer(tmp_path / "again", model=trained(make(), tmp_path), bf16=bf16)
    fresh.train()
    again.train()
    assert losses_of(fresh) == losses_of(again)
    assert torch.equal(weights_of(fresh), weights_of(again))


@pytest.mark.parametrize("cached", [True, False])
def test_a_model_that_accelerate_dispatched_trains_as_a_plain_one(cached, tmp_path):
    options = {"precompute_ref_log_probs": cached}
    plain = make_trainer(tmp_path / "plain", **options)
    model = dispatch_model(tiny_model(), {"": "cpu"}, main_device="cpu", force_hooks=True)
    hooked = make_trainer(tmp_path / "hooked", model=model, **options)
    plain.train()
    hooked.train()
    assert losses_of(plain) == losses_of(hooked)
    assert torch.equal(weights_of(plain), weights_of(hooked))


def test_a_model_with_trainable_weights_on_disk_is_refused(tmp_path):
    places = {"model": "cpu", "lm_head": "disk"}
    model = dispatch_model(tiny_model(), places, main_device="cpu", offload_dir=tmp_path / "weights")
    with pytest.raises(ValueError, match=r"model: expected trainable weights in memory, got lm_head.weight offloaded"):
        make_trainer(tmp_path, model=model)


@pytest.fixture
def liger_is_taken_off(monkeypatch):
    """Liger exchanges names of the model's module too."""
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))


def with_liger(model, **config):
    args = SimpleNamespace(device=torch.device("cuda"), liger_kernel_config=config)
    liger.use_liger_layers(model, args)
    return args.liger_kernel_config


def test_ligers_layers_run_packed_without_its_head(liger_is_taken_off, monkeypatch):
    """Its kernels in Triton's interpreter, which that of the rotary embeddings runs in, forward and backward."""
    (batch,) = pack(tiny_pairs(3))

    def gradients(model):
        logps = attach_logprob_head(model)(packed=batch).logps
        logps.sum().backward()
        return logps.detach(), {name: p.grad for name, p in model.named_parameters()}

    expected, expected_gradients = gradients(tiny_model())
    model, launched = tiny_model(), []
    own = vars(model).get("forward")
    run = GridExecutor.__call__
    monkeypatch.setattr(
        GridExecutor, "__call__", lambda self, *a, **o: (launched.append(self.fn.__name__), run(self, *a, **o))[1]
    )
    with_liger(model, rms_norm=False, swiglu=False)
    assert vars(model).get("forward") is own  # its fused head would stand there
    found, found_gradients = gradients(model)
    kernels = " ".join(launched)
    assert "rope" in kernels and "cross_entropy" not in kernels
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, atol=1e-5, rtol=1e-4)


def test_ligers_norms_and_mlps_take_the_place_of_the_models(liger_is_taken_off):
    model = tiny_model()
    with_liger(model)
    fused = [module for name, module in model.named_modules() if name.endswith(("norm", "mlp"))]
    assert len(fused) == 10 and all(module.forward.__module__.startswith("liger_kernel") for module in fused)


def test_liger_is_told_which_layers(monkeypatch):
    calls = []
    monkeypatch.setattr(liger, "apply_liger_kernel", lambda model, config: calls.append(copy.copy(config)))
    expected = {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}
    assert with_liger(tiny_model(), rope=False) == expected and calls == [expected]


def test_a_family_that_liger_has_no_layers_for_is_refused():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="use_liger_kernel: the installed liger-kernel has no layers for 'gpt2'"):
        with_liger(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "use_liger_kernel: Liger's layers are Triton kernels and need a GPU, and this run is on the CPU"),
        (
            {"liger_kernel_config": {"fused_linear_cross_entropy": True}},
            "liger_kernel_config: expected no cross_entropy",
        ),
    ],
)
def test_liger_that_cannot_run_is_refused_before_anything_is_done(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path / "run", use_liger_kernel=True, **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("peft_config", [None, LORA])
def test_what_text_never_reaches_in_a_composite_is_frozen(peft_config, tmp_path):
    torch.manual_seed(0)
    trainer = make_trainer(tmp_path, model=tiny_composite("qwen2_vl"), peft_config=peft_config)
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained and not any("visual" in name for name in trained)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = [name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])]
    assert sorted(moved) == sorted(trained)
