"""Whole training runs of trl's DPOTrainer with and without patch_trl(): the same curves, metrics and gradients.

Nothing here is particular to a version of trl: `python -m bench.old_trl 0.29.0` runs this file under another one.
"""

import pytest
import torch
import trl
from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from dpofast.integrations._trl.forward import FusedForward
from tests.support.families import family_model
from tests.support.tiny import SHAPE, tiny_model
from tests.support.trl_cases import assert_same_run, deep_pairs, text_pairs, train

pytestmark = pytest.mark.slow(30)

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
SETTINGS = {
    "plain": {},
    "no checkpointing": {"gradient_checkpointing": False},
    "reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}, "max_steps": 8},
    "precomputed": {"precompute_ref_log_probs": True},
    "keep_start": {"max_length": 9, "truncation_mode": "keep_start"},
    "weighted": {"use_weighting": True, "max_steps": 8},
    "ld_alpha": {"ld_alpha": 0.5, "max_steps": 8},
    "accumulation": {"gradient_accumulation_steps": 2, "max_steps": 6},
    "synced reference": {"sync_ref_model": True, "ref_model_sync_steps": 2, "max_steps": 8},
}
if hasattr(trl.DPOConfig, "loss_weights"):  # not in trl 0.19
    SETTINGS["mix"] = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2], "max_steps": 8}


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_the_run_is_the_same(options, tmp_path):
    plain = train(tmp_path / "plain", patched=False, **options)
    fast = train(tmp_path / "fast", patched=True, **options)
    assert_same_run(plain, fast)
    assert isinstance(fast[0].model, FusedForward) and not isinstance(plain[0].model, FusedForward)


@pytest.mark.parametrize("family", ["qwen3.5", "nemotron-h", "kimi-linear", "lfm2-moe"])
def test_a_hybrid_runs_packed_and_the_same(family, tmp_path):
    plain = train(tmp_path / "plain", patched=False, model=family_model(family), max_steps=4)
    fast = train(tmp_path / "fast", patched=True, model=family_model(family), max_steps=4)
    assert_same_run(plain, fast)
    assert set(fast[0].model._dpofast_fused.calls) == {"packed"}


def test_precomputing_runs_packed(tmp_path):
    """6 batches of reference log-probs, and not those that trl kept of an earlier run."""
    trainer, _ = train(tmp_path, patched=True, precompute_ref_log_probs=True, max_steps=1, data=text_pairs(seed=5))
    assert trainer.model._dpofast_fused.calls["packed"] == 6 + 1


def test_the_kernel_alone_gives_the_same_run(tmp_path):
    assert_same_run(train(tmp_path / "plain", patched=False), train(tmp_path / "fast", patched=True, level="kernel"))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_prompts_cut_from_the_left(tmp_path):
    """keep_end cuts a pair's prompts by different lengths, so they are not shared; and cuts whole prompts away."""
    options = {"max_length": 7, "truncation_mode": "keep_end", "max_steps": 8}
    plain = train(tmp_path / "plain", patched=False, **options)
    fast = train(tmp_path / "fast", patched=True, **options)
    # trl up to 0.28 counts one position too many in these metrics: _trl/logits.py
    assert_same_run(plain, fast, apart=("logits/",) if hasattr(trl.DPOTrainer, "concatenated_forward") else ())
    calls = fast[0].model._dpofast_fused.calls
    assert calls["packed"] == 16 and calls["pairs packed without sharing, because their prompts differ"] > 0


@pytest.mark.parametrize("precompute", [False, True])
def test_a_new_adapter(precompute, tmp_path):
    options = {"peft_config": LoraConfig(**LORA), "precompute_ref_log_probs": precompute}
    assert_same_run(
        train(tmp_path / "plain", patched=False, **options), train(tmp_path / "fast", patched=True, **options)
    )


def test_an_adapter_that_goes_on_being_trained(tmp_path):
    """trl copies it to an adapter "ref", which is the reference."""

    def run(folder, patched):
        torch.manual_seed(0)
        return train(folder, patched=patched, model=get_peft_model(tiny_model(), LoraConfig(**LORA)))

    assert_same_run(run(tmp_path / "plain", False), run(tmp_path / "fast", True))


def test_evaluation_is_the_same(tmp_path):
    options = {"eval_data": text_pairs(10, seed=3), "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    assert_same_run(
        train(tmp_path / "plain", patched=False, **options), train(tmp_path / "fast", patched=True, **options)
    )


def balanced_model(model_class, config_class):
    """A mixture of experts whose balancing loss trl adds."""
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.1}
    extra = {"moe_intermediate_size": 32, "head_dim": 8, "decoder_sparse_step": 1, "output_router_logits": True}
    return model_class(config_class(**SHAPE, **experts, **extra))


MIXTURES = (MixtralForCausalLM, MixtralConfig), (Qwen3MoeForCausalLM, Qwen3MoeConfig)


@pytest.mark.parametrize("classes", MIXTURES)
def test_the_balancing_loss_of_experts(classes, tmp_path):
    """It counts every token of every padded row: prompts twice, and the last token, which packing leaves out."""
    options = {"max_steps": 5, "max_length": 12, "truncation_mode": "keep_start"}
    plain = train(tmp_path / "plain", patched=False, model=balanced_model(*classes), **options)
    fast = train(tmp_path / "fast", patched=True, model=balanced_model(*classes), **options)
    assert plain[0].state.log_history[0].get("aux_loss", 1.0) > 0  # trl 0.29 has none
    assert_same_run(plain, fast)


@pytest.mark.parametrize("make", [tiny_model, lambda: balanced_model(*MIXTURES[0])], ids=["llama", "balanced experts"])
def test_rows_that_share_a_system_prompt_or_fork_late(make, tmp_path):
    """Sixteen pairs a step: of a balanced mixture every token of every row counts."""
    options = {"data": deep_pairs(), "per_device_train_batch_size": 16, "max_steps": 3}
    plain = train(tmp_path / "plain", patched=False, model=make(), **options)
    computed = {}
    for level in ("forward", "kernel"):
        model, widths = make(), []
        model.get_input_embeddings().register_forward_hook(
            lambda module, inputs, output, widths=widths: widths.append(inputs[0].numel())
        )
        assert_same_run(plain, train(tmp_path / level, patched=True, level=level, model=model, **options))
        computed[level] = max(widths)
    assert computed["forward"] < computed["kernel"] / 5


def test_equal_responses_after_truncation(tmp_path):
    data = text_pairs(4).map(lambda row: {"prompt": "3 4 5 6", "chosen": " 7 8 9", "rejected": " 7 8 10"})
    # at a rate of 0: the gradients cancel, and Adam would make steps out of their rounding
    options = {"data": data, "max_length": 6, "max_steps": 2, "learning_rate": 0.0}
    plain = train(tmp_path / "plain", patched=False, **options)
    fast = train(tmp_path / "fast", patched=True, **options)
    assert_same_run(plain, fast)


def test_mixed_precision(tmp_path):
    """accelerate binds a model's forward when it prepares it; both models run packed all the same."""
    plain, _ = train(tmp_path / "plain", patched=False, bf16=True, max_steps=4)
    fast, _ = train(tmp_path / "fast", patched=True, bf16=True, max_steps=4)
    assert fast.model._dpofast_fused.calls == {"packed": 2 * 4}
    for theirs, ours in zip(plain.state.log_history[:4], fast.state.log_history[:4], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-2)
        assert ours["logps/chosen"] == pytest.approx(theirs["logps/chosen"], abs=0.3)


def test_a_model_that_another_trainer_left_wrapped(tmp_path):
    """accelerate and trl leave forwards on the instance, which hide those of the class."""

    def run(folder, **options):
        model = tiny_model()
        train(folder / "before", patched=False, model=model, ref_model=tiny_model(), bf16=True, max_steps=2)
        assert "forward" in vars(model)
        return train(folder, model=model, ref_model=tiny_model(), max_steps=3, **options)

    plain = run(tmp_path / "plain", patched=False)
    for level in ("forward", "kernel"):
        assert_same_run(plain, run(tmp_path / level, patched=True, level=level))
