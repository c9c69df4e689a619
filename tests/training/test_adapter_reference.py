"""The reference under PEFT is the model before training, whatever the adapter does to the base weights."""

import math

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from dpofast import attach_logprob_head, reference
from tests.support.tiny import save_tiny, tiny_dataset, tiny_model, tiny_pairs
from tests.support.tiny_training import losses_of, make_trainer

pytestmark = pytest.mark.slow(15)

TARGETS = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def lora(**options):
    return LoraConfig(**{**TARGETS, **options})


def qwen():
    """A model with biases, wide enough that a wrong reference is far off."""
    model = tiny_model("qwen2")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model


def chosen_logps(model, examples):
    """Summed log-probs of the chosen responses, by a plain padded forward."""
    rows = [(e["prompt_ids"], e["chosen_ids"]) for e in examples]
    cu = torch.tensor([0, *torch.tensor([len(response) for _, response in rows]).cumsum(0)])
    with torch.no_grad():
        return reference.sequence_logprobs(
            reference.padded_logprobs(model.eval(), **reference.padded_rows(rows)), cu
        ).tolist()


@pytest.mark.parametrize("init", [True, "pissa", "olora"])
@pytest.mark.parametrize("precompute", [True, False])
def test_an_adapter_that_rewrites_the_base_weights(tmp_path, init, precompute):
    examples = tiny_pairs(8)
    config = lora(init_lora_weights=init, target_modules="all-linear")
    options = {"precompute_ref_log_probs": precompute, "train_sampling_strategy": "sequential"}
    trainer = make_trainer(tmp_path, model=qwen(), peft_config=config, train=Dataset.from_list(examples), **options)
    if precompute:
        assert trainer.train_dataset["ref_chosen_logps"][:] == pytest.approx(chosen_logps(qwen(), examples), abs=1e-3)
    trainer.train()
    assert losses_of(trainer)[0] == pytest.approx(math.log(2), abs=1e-4)


def test_both_ways_to_the_reference_agree_where_the_base_weights_were_rewritten(tmp_path):
    runs = []
    for precompute in (True, False):
        config = lora(init_lora_weights="pissa")
        trainer = make_trainer(tmp_path, model=qwen(), peft_config=config, precompute_ref_log_probs=precompute)
        trainer.train()
        runs.append(losses_of(trainer))
    assert runs[0] == pytest.approx(runs[1], abs=1e-4) and runs[0][-1] < runs[0][0]


def test_an_adapter_that_changes_what_the_model_computes_has_no_reference(tmp_path, monkeypatch):
    def rounding(model, config):  # what LoftQ does: base plus adapter is the model but for an error of quantization
        wrapped = get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "base_layer.weight" in name:
                    parameter.copy_((parameter * 4).round() / 4)
        return wrapped

    monkeypatch.setattr("peft.get_peft_model", rounding)
    message = "new adapter rewrote the base weights.*give that model as ref_model"
    for precompute in (True, False):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, model=qwen(), peft_config=lora(), precompute_ref_log_probs=precompute)
    make_trainer(tmp_path, model=qwen(), peft_config=lora(), ref_model=qwen())
    with_columns = [{**e, "ref_chosen_logps": -5.0, "ref_rejected_logps": -6.0} for e in tiny_pairs(4)]
    make_trainer(tmp_path, model=qwen(), peft_config=lora(), train=Dataset.from_list(with_columns))
    make_trainer(tmp_path, model=qwen(), peft_config=lora(), loss_type="simpo")


def unfrozen_norms():
    model = get_peft_model(qwen(), lora())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or "norm" in name)
    return {"model": model}


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"model": qwen(), "peft_config": lora(bias="all")},
        lambda: {"model": qwen(), "peft_config": lora(bias="lora_only")},
        unfrozen_norms,
    ],
)
def test_what_trains_outside_of_the_adapter_needs_a_reference_from_before(tmp_path, make):
    with pytest.raises(ValueError, match="precompute_ref_log_probs: expected True, as .* would train outside"):
        make_trainer(tmp_path, **make(), precompute_ref_log_probs=False)
    torch.manual_seed(0)
    cached = make_trainer(tmp_path, **make())
    cached.train()
    torch.manual_seed(0)
    apart = make_trainer(tmp_path, **make(), ref_model=qwen(), precompute_ref_log_probs=False)
    apart.train()
    assert losses_of(cached) == pytest.approx(losses_of(apart), abs=1e-5)
    with pytest.raises(ValueError, match="reference model, which is gone"):  # the base has moved
        cached.evaluate(tiny_dataset(3, seed=5))


def test_trained_weights_that_an_adapters_folder_does_not_hold_are_warned_of(tmp_path, recwarn):
    make_trainer(tmp_path, model=qwen(), peft_config=lora(bias="all"))
    assert not [warning for warning in recwarn if "not part of the adapter" in str(warning.message)]
    with pytest.warns(UserWarning, match="layernorm.*will not hold them: name them in its modules_to_save"):
        make_trainer(tmp_path, **unfrozen_norms())


def test_the_copy_of_an_adapter_whose_weights_are_plain_parameters(tmp_path):
    runs = []
    for precompute in (True, False):
        torch.manual_seed(0)
        config = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
        model = get_peft_model(qwen(), config)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.mul_(torch.rand_like(parameter) + 0.5)
        trainer = make_trainer(tmp_path, model=model, precompute_ref_log_probs=precompute)
        trainer.train()
        runs.append(losses_of(trainer))
    assert runs[0][0] == pytest.approx(math.log(2), abs=1e-5)
    assert runs[0] == pytest.approx(runs[1], abs=1e-5)


def two_adapters(second="two"):
    """Two random adapters, of which the first is active."""
    torch.manual_seed(0)
    model = get_peft_model(qwen(), lora())
    model.add_adapter(second, lora(r=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def test_two_active_adapters_stay_active_or_are_refused(tmp_path):
    def both():
        model = two_adapters()
        model.base_model.set_adapter(["default", "two"])
        return model

    examples = tiny_pairs(8)
    trainer = make_trainer(tmp_path, model=both(), train=Dataset.from_list(examples))
    assert trainer.train_dataset["ref_chosen_logps"][:] == pytest.approx(chosen_logps(both(), examples), abs=1e-3)
    trainer.train()
    assert losses_of(trainer)[0] == pytest.approx(math.log(2), abs=1e-5)
    model = both()
    with pytest.raises(ValueError, match=r"one active adapter .* got \['default', 'two'\]"):
        make_trainer(tmp_path, model=model, precompute_ref_log_probs=False)
    assert model.active_adapters == ["default", "two"] and list(model.peft_config) == ["default", "two"]
    make_trainer(tmp_path, model=model, ref_model=both(), precompute_ref_log_probs=False).train()
    assert model.active_adapters == ["default", "two"]


def test_the_adapter_that_is_active_in_the_layers_is_the_one_copied(tmp_path):
    runs = []
    for precompute in (True, False):
        model = two_adapters()
        model.base_model.set_adapter("two")  # PeftModel.active_adapter still says "default"
        frozen = [name for name, p in model.named_parameters() if p.requires_grad and "lora_A" in name]
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        before = {name: model.get_parameter(name).clone() for name in frozen}
        trainer = make_trainer(tmp_path, model=model, precompute_ref_log_probs=precompute)
        trainer.train()
        runs.append(losses_of(trainer))
        assert model.active_adapters == ["two"]
        assert all(torch.equal(model.get_parameter(name), weight) for name, weight in before.items())
    assert runs[0][0] == pytest.approx(math.log(2), abs=1e-5) and abs(runs[0][1] - runs[0][0]) > 1e-3
    assert runs[0] == pytest.approx(runs[1], abs=1e-5)


def test_a_second_training_takes_a_copy_of_its_own(tmp_path):
    model = two_adapters("reference")  # a name that a user may have taken
    named = {name: p.clone() for name, p in model.named_parameters() if "reference" in name.split(".")}
    for _ in range(2):
        trainer = make_trainer(tmp_path, model=model, precompute_ref_log_probs=False)
        trainer.train()
        assert losses_of(trainer)[0] == pytest.approx(math.log(2), abs=1e-5)
        assert abs(losses_of(trainer)[1] - math.log(2)) > 1e-4
    assert len(model.peft_config) == 3 and model.active_adapters == ["default"]
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in named.items())


def test_a_merged_adapter_is_refused_until_it_is_taken_out(tmp_path):
    model = two_adapters()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"model: adapter default is merged.*model.unmerge_adapter\(\) first"):
        make_trainer(tmp_path, model=model)
    model.unmerge_adapter()
    make_trainer(tmp_path, model=model)
    model.merge_adapter()
    make_trainer(tmp_path, ref_model=model)  # a reference gets no gradient


@pytest.mark.parametrize(
    ("models", "named"),
    [
        (lambda: {"peft_config": lora(), "ref_model": tiny_model()}, r"model\.\S+ .* has base_model\.model\."),
        (lambda: {"peft_config": IA3Config(target_modules=["v_proj"], feedforward_modules=[])}, "base_model"),
        (lambda: {"ref_model": tiny_model("llama", num_hidden_layers=1)}, r"model\.layers\.1\."),
        (lambda: {"ref_model": tiny_model("llama-tied")}, "no further parameter where the policy has lm_head.weight"),
        (lambda: {"ref_model": tiny_model("llama", intermediate_size=24)}, r"mlp\.\w+\.weight \(24, "),
    ],
    ids=["lora", "ia3", "layers", "tied", "shape"],
)
def test_a_moving_reference_has_the_parameters_of_the_policy(tmp_path, models, named):
    given = {"ref_model": tiny_model(), **models()}
    with pytest.raises(ValueError, match=f"sync_ref_model: expected .* policy's parameters.*{named}"):
        make_trainer(tmp_path, sync_ref_model=True, **given)


def test_a_moving_reference_with_an_adapter_like_the_policys(tmp_path):
    policy, ref_model = two_adapters(), two_adapters()
    options = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0}
    trainer = make_trainer(tmp_path, model=policy, ref_model=ref_model, **options)
    trainer.train()
    for (name, ours), theirs in zip(policy.named_parameters(), ref_model.parameters(), strict=True):
        torch.testing.assert_close(theirs, ours.detach(), msg=name)


def test_adapters_that_cannot_run_are_refused_by_name(tmp_path):
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="got PromptTuningConfig: prompt-learning"):
        make_trainer(tmp_path, peft_config=prompts)
    with pytest.raises(ValueError, match="got PromptTuningConfig: prompt-learning"):
        make_trainer(tmp_path, model=get_peft_model(tiny_model(), prompts))
    with pytest.raises(ValueError, match="got PromptTuningConfig: prompt-learning"):  # in a loop of one's own
        attach_logprob_head(get_peft_model(tiny_model(), prompts))
    with pytest.raises(ValueError, match="peft_config: the model is a PeftModel already: leave peft_config out"):
        make_trainer(tmp_path, model=get_peft_model(tiny_model(), lora()), peft_config=lora())


def test_a_model_with_nothing_to_train_is_refused_before_the_reference_pass(tmp_path):
    base = save_tiny(tmp_path / "base")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora()).save_pretrained(tmp_path / "adapter")
    frozen = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"nothing|something to train.*is_trainable=True"):
        make_trainer(tmp_path / "run", model=frozen)
    merged = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter").merge_and_unload()
    with pytest.raises(ValueError, match=r"something to train.*requires_grad_\(True\)"):
        make_trainer(tmp_path / "run", model=merged)
    injected = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="loaded from an adapter's folder by transformers"):
        make_trainer(tmp_path / "run", model=injected)
    assert not (tmp_path / "run" / "reference").exists()
    make_trainer(
        tmp_path / "run", model=PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter", is_trainable=True)
    )


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("tied", "options"),
    [
        (False, {"modules_to_save": ["lm_head"]}),
        (True, {"trainable_token_indices": [3, 4, 5]}),
        (True, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    ],
    ids=["head", "tokens", "tied"],
)
def test_a_head_that_trains_beside_an_adapter_has_the_gradients_of_a_plain_forward(tmp_path, tied, options, padded):
    examples = tiny_pairs(4)
    model = tiny_model("llama-tied" if tied else "llama")
    trainer = make_trainer(
        tmp_path,
        model=model,
        peft_config=lora(**options),
        padded=padded,
        train=Dataset.from_list(examples),
        train_sampling_strategy="sequential",
    )
    step = next(iter(trainer.get_train_dataloader()))
    trainer.training_step(trainer.model, step)
    ours = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()

    rows = [(e["prompt_ids"], e[side]) for e in examples for side in ("chosen_ids", "rejected_ids")]
    cu = torch.tensor([0, *torch.tensor([len(response) for _, response in rows]).cumsum(0)])
    logps = reference.sequence_logprobs(
        reference.padded_logprobs(trainer.model, **reference.padded_rows(rows), use_cache=False), cu
    )
    pairs = torch.arange(len(rows)).view(-1, 2)
    reference.sigmoid_loss(logps, pairs, logps.detach())[0].mean().backward()
    plain = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    assert ours.keys() == plain.keys()
    assert any(p.norm() > 1e-3 for name, p in plain.items() if "lora" not in name)
    for name, gradient in plain.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-6, rtol=1e-4)
