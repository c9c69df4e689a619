"""Quantized base weights: MXFP4 checkpoints are loaded as their own numbers, and what passes no gradient is refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM, Mxfp4Config

from dpofast import attach_logprob_head, pack
from dpofast.model.checks.quantized import check_quantized, check_shardable
from dpofast.model.load import load_causal_lm
from dpofast.training.parallel.fsdp import cast_parameters
from tests.support.tiny import tiny_model

# E2M1: a sign, two bits of exponent, one of fraction.
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def mxfp4_checkpoint(folder):
    """Write a tiny gpt-oss whose experts are MXFP4; return it with the same weights in float32."""
    torch.manual_seed(0)
    config = GptOssConfig(
        **{"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4},
        **{
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    )
    model = GptOssForCausalLM(config).eval()
    model.save_pretrained(folder)
    state, own = load_file(folder / "model.safetensors"), dict(model.named_parameters())
    for name in [name for name in state if "experts" in name and name.endswith("_proj")]:
        experts, inputs, outputs = state.pop(name).shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(119, 123, (experts, outputs, inputs // 32), dtype=torch.uint8)
        values = torch.stack((FP4[(blocks & 15).long()], FP4[(blocks >> 4).long()]), -1).flatten(-2)
        values = (values * 2.0 ** (scales.float() - 127)[..., None]).flatten(-2).transpose(1, 2)
        own[name].data.copy_(values)
        state |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(settings))
    return model


@pytest.mark.parametrize("options", [{}, {"quantization_config": Mxfp4Config(dequantize=True)}])
def test_mxfp4_is_loaded_as_its_numbers_and_can_train(tmp_path, options):
    truth = mxfp4_checkpoint(tmp_path)
    model = load_causal_lm(str(tmp_path), dtype=torch.float32, **options)
    for name, weight in truth.named_parameters():
        assert torch.equal(model.get_parameter(name), weight), name
    (batch,) = pack([{"prompt_ids": [3, 4, 5], "chosen_ids": [6, 7], "rejected_ids": [8]}])
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    expected = truth(ids).logits.log_softmax(-1)[0, [2, 3], [6, 7]]
    torch.testing.assert_close(attach_logprob_head(model)(packed=batch).logps[:2], expected, atol=1e-5, rtol=1e-5)
    check_quantized(model)  # no layer is quantized any more


def quantized(method, *, is_trainable):
    """A tiny model that says it is quantized by a method that cannot run here."""
    model = tiny_model("llama")
    model.hf_quantizer = SimpleNamespace(
        quantization_config=SimpleNamespace(quant_method=method), is_trainable=is_trainable
    )
    model.is_quantized = True
    return model


@pytest.mark.parametrize(
    ("method", "way"),
    [
        ("mxfp4", r"Mxfp4Config\(dequantize=True\)"),
        ("nvfp4", "16-bit checkpoint without a quantization_config"),
        ("vptq", "load a 16-bit checkpoint of it"),
    ],
)
def test_layers_that_pass_no_gradient_are_refused_by_name(method, way):
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = quantized(method, is_trainable=False)
    for each in (model, get_peft_model(model, lora)):
        with pytest.raises(ValueError, match=f"LlamaForCausalLM is quantized by {method}, .*no gradient.*{way}"):
            check_quantized(each)


def test_quantized_weights_train_by_an_adapter_alone():
    model = quantized("bitsandbytes", is_trainable=True)
    with pytest.raises(ValueError, match="quantized weights cannot be trained themselves: give a peft_config"):
        check_quantized(model)
    check_quantized(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")))


@pytest.mark.parametrize(
    ("stored", "gathered", "wanted"),
    [
        (torch.uint8, None, "bfloat16"),
        (torch.uint8, torch.float16, "float16"),
        (torch.float32, torch.bfloat16, "bfloat16"),
    ],
)
def test_4_bit_weights_that_fsdp2_cannot_shard_as_they_are_are_refused(stored, gathered, wanted):
    kind = type("Params4bit", (torch.nn.Parameter,), {})
    model = torch.nn.Module()
    model.weight = kind(torch.zeros(4, 1).to(stored), requires_grad=False)
    with pytest.raises(
        ValueError, match=rf"bnb_4bit_quant_storage: expected torch\.{wanted}, .* got {stored} of weight"
    ):
        check_shardable(model, gathered)
    model.weight = kind(torch.zeros(4, 1).to(gathered or torch.float32), requires_grad=False)
    check_shardable(model, gathered)


def test_packed_bits_of_a_reference_are_not_rounded():
    kind = type("Params4bit", (torch.nn.Parameter,), {})
    model = torch.nn.Linear(2, 2)
    model.weight = kind(torch.randn(4, 1), requires_grad=False)
    before = model.weight.detach().clone()
    cast_parameters(model, torch.bfloat16)
    assert torch.equal(model.weight, before) and model.bias.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="bnb_4bit_quant_storage"):
        check_shardable(model, torch.bfloat16)
