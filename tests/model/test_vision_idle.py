"""Idle images: a batch without images calls the vision tower as one with images does, and computes what it did."""

import copy

import pytest
import torch

from dpofast import attach_logprob_head, pack
from dpofast.model import forward
from dpofast.model.vision.idle import idle_image, with_idle_image
from tests.support.vision_models import FAMILIES, PACKED, vision_model
from tests.support.vision_prompts import mixed_prompts, packed

_TEXT = [{"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [10, 11, 12]}]


def calls_of(model):
    """Two lists that grow by modules' names in the order in which they run: units, which FSDP2 shards; with weights."""
    units, weights = [], []
    for name, module in model.named_modules():
        if type(module).__name__ in model._no_split_modules or module is model.get_input_embeddings():
            module.register_forward_pre_hook(lambda *_, name=name: units.append(name))
        elif list(module.parameters(recurse=False)):
            module.register_forward_pre_hook(lambda *_, name=name: weights.append(name))
    return units, weights


def gradients(model):
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize(
    "family, padded",
    [(family, padded) for family in FAMILIES for padded in (False, True) if padded or family in PACKED],
)
def test_the_tower_runs_as_for_an_image_and_counts_zero_times(family, padded, monkeypatch):
    # as with several processes, all padded rows in one call
    monkeypatch.setattr(forward, "similar_lengths", lambda lengths: [lengths.argsort(descending=True).tolist()])
    model = attach_logprob_head(vision_model(family), padded=padded).train()
    text, seeing = copy.deepcopy(model), copy.deepcopy(model)
    (batch,) = pack(_TEXT)
    expected = text(packed=batch).logps
    expected.sum().backward()

    calls = calls_of(model)
    logps = model(packed=with_idle_image(batch, idle_image(model))).logps
    torch.testing.assert_close(logps, expected, atol=1e-6, rtol=0)
    logps.sum().backward()
    found, own = gradients(model), gradients(text)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, own.get(name, torch.zeros_like(gradient)), atol=1e-6, rtol=1e-5)

    seen = calls_of(seeing)
    (images,) = packed(seeing, mixed_prompts(family))
    seeing(packed=images).logps.sum().backward()
    assert calls[0] == seen[0]
    assert set(calls[1]) == set(seen[1])
    # experts may go unused
    assert {name for name in found if "expert" not in name} == {
        name for name in gradients(seeing) if "expert" not in name
    }


def test_a_batch_with_images_stays_as_it_is():
    model = attach_logprob_head(vision_model("qwen2_vl"))
    (batch,) = packed(model, mixed_prompts("qwen2_vl"))
    assert with_idle_image(batch, idle_image(model)) is batch
