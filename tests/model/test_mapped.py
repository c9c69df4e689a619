"""Models that are loaded in the dtype of their files and converted as shards: equal to those converted as they load."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3TextConfig, Qwen3MoeConfig

from dpofast.model.load import load_causal_lm
from dpofast.model.parallel.mapped import load_to_shard, widened
from tests.support.tiny import SHAPE, tiny_model

CONFIGS = {
    # its embedding's scale is a buffer that no file has: sqrt(32), which bfloat16 rounds to 5.65625
    "gemma3": Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=4),
    "qwen3_moe": Qwen3MoeConfig(**SHAPE, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2),
}


def model_of(family):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[family]) if family in CONFIGS else tiny_model(family)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "llama-tied", *CONFIGS])
def test_shards_get_what_the_whole_model_would(family, dtype, tmp_path):
    model_of(family).to(dtype).save_pretrained(tmp_path, max_shard_size="20KB")
    expected = load_causal_lm(str(tmp_path), dtype=torch.float32)
    model = load_to_shard(str(tmp_path), dtype=torch.float32)
    first = next(iter(model.parameters()))
    first.requires_grad_(False)
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    with widened(model):
        assert not any(weight.requires_grad for weight in model.parameters())
    assert [weight.requires_grad for weight in model.parameters()].count(False) == 1 and not first.requires_grad
    theirs = dict([*expected.named_parameters(), *expected.named_buffers()])
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
    assert model.config.to_dict() == expected.config.to_dict()
    with widened(model):  # once
        assert any(weight.requires_grad for weight in model.parameters())


def test_a_rounded_scale_would_be_found(tmp_path):
    model_of("gemma3").bfloat16().save_pretrained(tmp_path)
    scale = load_to_shard(str(tmp_path), dtype=torch.float32).model.embed_tokens.embed_scale
    assert scale.item() == pytest.approx(32**0.5, rel=1e-6)


def test_weights_lie_in_their_mapped_files(tmp_path):
    model_of("llama").bfloat16().save_pretrained(tmp_path)
    model = load_to_shard(str(tmp_path), dtype=torch.float32)
    (bounds,) = in_memory(tmp_path / "model.safetensors")
    assert all(bounds[0] <= weight.data_ptr() < bounds[1] for weight in model.parameters())
    load_causal_lm(str(tmp_path), dtype=torch.float32)
    assert len(in_memory(tmp_path / "model.safetensors")) == 1


def in_memory(file):
    """The addresses where Linux has mapped a file for this process."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    return [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]


def test_other_files_are_converted_as_they_are_read(tmp_path):
    model_of("llama").bfloat16().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] = weights["model.norm.weight"].float() + 2**-20  # what bfloat16 has not
    save_file(weights, file, metadata={"format": "pt"})
    mixed = load_to_shard(str(tmp_path), dtype=torch.float32)
    assert {weight.dtype for weight in mixed.parameters()} == {torch.float32}
    assert torch.equal(mixed.model.norm.weight, weights["model.norm.weight"])
    narrow = load_to_shard(str(tmp_path), dtype=torch.bfloat16)
    assert {weight.dtype for weight in narrow.parameters()} == {torch.bfloat16}
    with widened(narrow):
        pass
    assert {weight.dtype for weight in narrow.parameters()} == {torch.bfloat16}


def test_a_missing_model_is_reported_as_ever(tmp_path):
    with pytest.raises(ValueError, match="its weights cannot be loaded from safetensors"):
        load_to_shard(str(tmp_path / "nowhere"), dtype=torch.float32)
