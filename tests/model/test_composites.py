"""Composite models on pairs of text: their language model with its head, against their own whole forward."""

import pytest
import torch
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

from dpofast import attach_logprob_head, detach_logprob_head, pack, reference
from tests.support.close import named
from tests.support.composites import COMPOSITES, MEDIA_ID, tiny_composite
from tests.support.tiny import tiny_pairs


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", COMPOSITES)
def test_text_alone_equals_the_composites_own_forward(family, padded):
    model = tiny_composite(family).eval()
    original = type(model)
    (batch,) = pack(tiny_pairs())
    model.get_output_embeddings().weight.data.mul_(10.0)  # log-probs that are far apart
    truth = reference.padded_logprobs(model, *batch.padded(), use_cache=False)
    truth.sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert truth.std() > 0.5
    model.zero_grad()
    attach_logprob_head(model, padded=padded)
    logps = model(packed=batch).logps
    torch.testing.assert_close(logps, truth, atol=2e-6, rtol=1e-6)
    logps.sum().backward()
    for name, parameter in model.named_parameters():
        if name in gradients:
            # Gemma 4's gradients are up to 110, and float32's own error 2e-4
            close = 1e-5 * max(10.0, float(gradients[name].abs().max()))
            torch.testing.assert_close(parameter.grad, gradients[name], atol=close, rtol=1e-4, msg=named(name))
        else:
            assert parameter.grad is None, name
    detach_logprob_head(model)
    assert torch.equal(reference.padded_logprobs(model, *batch.padded(), use_cache=False), truth)
    assert type(model) is original


def test_the_place_of_an_image_is_refused():
    model = attach_logprob_head(tiny_composite("llava"))
    (batch,) = pack([{"prompt_ids": [5, MEDIA_ID], "chosen_ids": [6], "rejected_ids": [7]}])
    with pytest.raises(ValueError, match=r"packed: expected text alone, got ids among \[0\].*LlavaForConditional"):
        model(packed=batch)


def test_attention_over_the_whole_prompt_is_refused_by_name():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2}
    text = {**sizes, "model_type": "gemma", "vocab_size": 97, "head_dim": 16, "num_key_value_heads": 1}
    config = PaliGemmaConfig(text_config=text, vision_config={**sizes, "image_size": 28, "projection_dim": 32})
    with pytest.raises(ValueError, match="PaliGemmaForConditionalGeneration: it attends to the whole of its prompt"):
        attach_logprob_head(PaliGemmaForConditionalGeneration(config))


def test_a_composite_that_needs_images_is_refused_by_name():
    model = tiny_composite("llava")

    class Needing(type(model)):
        def forward(self, pixel_values, **inputs):
            return super().forward(pixel_values=pixel_values, **inputs)

    model.__class__ = Needing
    with pytest.raises(ValueError, match="Needing: it does not run on text alone: TypeError: .*'pixel_values'"):
        attach_logprob_head(model)
    assert type(model) is Needing
