"""Images that a model or a family does not take: refused by name, and text goes on as before."""

import copy
import pickle

import pytest
import torch

from dpofast import attach_logprob_head, detach_logprob_head, pack, vision_inputs
from dpofast.model.checks.images import images_refused
from dpofast.packing.media import PromptMedia
from tests.support.composites import tiny_composite
from tests.support.tiny import tiny_model, tiny_pairs
from tests.support.vision_models import FAMILIES, IMAGE, VIDEO, vision_model
from tests.support.vision_prompts import mixed_prompts, packed, prompt, sequences, with_branches


def text(*ids):
    return {"prompt_ids": list(ids), "chosen_ids": [6], "rejected_ids": [7]}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_number_of_placeholders_is_refused(family):
    inputs = vision_inputs(vision_model(family))
    one = prompt(family, [(0, 1), (1, 2)])
    assert inputs.of_prompt(one.ids, one.processed) is not None
    at = one.ids.index(IMAGE)
    expected = one.ids.count(IMAGE)
    for wrong, count in ((one.ids[:at] + one.ids[at + 1 :], expected - 1), ([IMAGE, *one.ids], expected + 1)):
        with pytest.raises(ValueError, match=rf"row 3: expected {expected} image placeholders .* got {count}:"):
            inputs.of_prompt(wrong, one.processed, "row 3")


def test_processors_outputs_that_do_not_fit_are_refused():
    inputs = vision_inputs(vision_model("qwen3_vl"))
    one = prompt("qwen3_vl", [(0, 1), (1, 2)])
    assert inputs.of_prompt([5, 6], {}) is None
    assert inputs.of_prompt([5, 6], {"pixel_values": None}) is None
    with pytest.raises(ValueError, match="prompt: expected an image for 10 image placeholders .*got no pixel_values"):
        inputs.of_prompt(one.ids, {})
    with pytest.raises(ValueError, match="expected pixel_values, image_grid_thw of the processor, got no image_grid"):
        inputs.of_prompt(one.ids, {"pixel_values": one.processed["pixel_values"]})
    with pytest.raises(ValueError, match="expected tensors of the same images from the processor, got shapes"):
        inputs.of_prompt(one.ids, {**one.processed, "pixel_values": one.processed["pixel_values"][1:]})
    with pytest.raises(ValueError, match=r"pixel_values: expected a tensor of the processor \(return_tensors='pt'\)"):
        inputs.of_prompt(one.ids, {**one.processed, "pixel_values": [[1.0], [1.0, 2.0]]})
    nested = vision_inputs(vision_model("idefics3"))
    two = prompt("idefics3", [(0, 1)])
    pixels = two.processed["pixel_values"]
    with pytest.raises(ValueError, match=r"output for one prompt, pixel_values of shape \(1, images, ...\), got \(2"):
        nested.of_prompt(two.ids, {"pixel_values": torch.cat((pixels, pixels))})


def test_numpy_outputs_and_a_pickled_reader_give_the_same_images():
    inputs = pickle.loads(pickle.dumps(vision_inputs(vision_model("llava_next"))))
    one = prompt("llava_next", [(0, 1), (1, 2)])
    media = inputs.of_prompt(one.ids, one.processed)
    arrays = {name: list(tensor.numpy()) for name, tensor in one.processed.items()}
    again = inputs.of_prompt(one.ids, arrays)
    assert [image.key for image in media.images] == [image.key for image in again.images]
    alone = prompt("llava_next", [(0, 1)])  # not padded to the tiles of the second
    assert inputs.of_prompt(alone.ids, alone.processed).images[0].key == media.images[0].key


def test_placeholders_in_text_and_responses_are_refused():
    model = attach_logprob_head(vision_model("qwen3_vl"))
    message = rf"packed: expected text alone, got ids among \[{IMAGE}, {VIDEO}\], which stand for images or sound in"
    for row in (
        text(5, IMAGE),
        text(5, VIDEO),
        {**text(5), "chosen_ids": [6, IMAGE, 8]},
        {**text(5), "rejected_ids": [7, IMAGE]},  # the last token is only a target
    ):
        (batch,) = pack([row])
        with pytest.raises(ValueError, match=message):
            model(packed=batch)
    one = prompt("qwen3_vl", [(0, 1)])
    media = vision_inputs(model).of_prompt(one.ids, one.processed)
    with pytest.raises(ValueError, match=r"examples\[0\]: expected image placeholders in prompts with media alone"):
        pack([{"prompt_ids": one.ids, "chosen_ids": [6, IMAGE], "rejected_ids": [7], "media": media}])
    (batch,) = pack([{"prompt_ids": one.ids, "chosen_ids": [6, VIDEO], "rejected_ids": [7, VIDEO], "media": media}])
    with pytest.raises(ValueError, match=rf"packed: expected text alone, got ids among \[{VIDEO}\], which stand for"):
        model(packed=batch)


def test_placeholders_of_another_model_are_refused():
    model = attach_logprob_head(vision_model("llava"))
    one = prompt("llava", [(0, 1)])
    media = vision_inputs(model).of_prompt(one.ids, one.processed)
    ids = [95 if token == IMAGE else token for token in one.ids]
    (batch,) = pack([{**text(*ids), "media": PromptMedia(media.images, 95)}])
    with pytest.raises(ValueError, match=rf"media with {IMAGE} as the id of LlavaForCond.* placeholders, got 95"):
        model(packed=batch)


def test_models_without_images_are_refused_by_name():
    one = prompt("llava", [(0, 1)])
    media = vision_inputs(vision_model("llava")).of_prompt(one.ids, one.processed)
    (batch,) = pack([{**text(*one.ids), "media": media}])
    model = attach_logprob_head(tiny_model())
    with pytest.raises(ValueError, match="LlamaForCausalLM: images of llama models are not supported, only text"):
        model(packed=batch)
    with pytest.raises(ValueError, match="LlamaForCausalLM: images of llama models are not supported, only text"):
        vision_inputs(model)
    composite = attach_logprob_head(tiny_composite("gemma4").eval())
    with pytest.raises(ValueError, match="Gemma4ForConditionalGeneration: images of gemma4 models are not supported"):
        composite(packed=batch)
    (plain,) = pack(tiny_pairs())
    assert composite(packed=plain).logps.isfinite().all()


def test_attention_in_both_directions_is_refused_packed_and_right_padded():
    """Of the right numbers over padded rows tells test_vision.py."""
    model = attach_logprob_head(vision_model("gemma3"))
    (batch,) = packed(model, mixed_prompts("gemma3"))
    message = (
        "Gemma3ForConditionalGeneration: packed rows with images are not supported, as it attends in both directions "
        r"inside an image; padded rows are: attach_logprob_head\(model, padded=True\)"
    )
    with pytest.raises(ValueError, match=message):
        model(packed=batch)
    (plain,) = pack([text(5, 8)])
    assert model(packed=plain).logps.isfinite().all()
    attach_logprob_head(detach_logprob_head(model), padded=True)
    assert model(packed=batch).logps.isfinite().all()


def test_a_model_whose_check_with_an_image_fails_takes_text_alone():
    model = vision_model("llava")
    inner = type(model.model)

    class Uneven(inner):
        """Its features depend on the length of the row, of which a packed row has another."""

        def forward(self, input_ids=None, **options):
            self.scale = input_ids.shape[1]
            return super().forward(input_ids=input_ids, **options)

        def get_image_features(self, *args, **options):
            output = super().get_image_features(*args, **options)
            output.pooler_output = [features * self.scale for features in output.pooler_output]
            return output

    model.model.__class__ = Uneven
    attach_logprob_head(model)
    reason = images_refused(model)
    assert reason is not None
    assert "LlavaForConditionalGeneration: the check with a small random image has failed" in reason
    assert "packed and padded log-probs of the same tokens differ" in reason
    (batch,) = packed(model, mixed_prompts("llava"))
    with pytest.raises(ValueError, match="the check with a small random image has failed"):
        model(packed=batch)
    (plain,) = pack([text(5, 8)])
    assert model(packed=plain).logps.isfinite().all()


def test_images_beyond_the_length_of_the_rotary_table_are_refused():
    model = vision_model("qwen2_vl")
    config = copy.deepcopy(model.config)
    config.text_config.max_position_embeddings = 24
    rope = config.text_config.rope_parameters
    config.text_config.rope_parameters = {**rope, "rope_type": "dynamic", "factor": 2.0}
    torch.manual_seed(0)
    model = attach_logprob_head(type(model)(config).eval())
    prompts = with_branches([prompt("qwen2_vl", [(0, 1)], after=(8,) * 20)], (2,))
    (batch,) = packed(model, prompts)
    assert max(len(one.ids) + len(response) for one, response in sequences(prompts)) > 24
    with pytest.raises(ValueError, match="Qwen2VLForConditionalGeneration: a sequence of .* not supported beside imag"):
        model(packed=batch)


def test_a_copy_and_a_pickled_model_take_images():
    model = attach_logprob_head(vision_model("qwen3_vl"))
    (batch,) = packed(model, mixed_prompts("qwen3_vl"))
    logps = model(packed=batch).logps
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(packed=batch).logps, logps)


def test_attaching_leaves_no_trace_of_the_image_that_it_tries():
    model = vision_model("qwen2_vl")
    embeds = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    before = model(inputs_embeds=embeds).logits
    attach_logprob_head(model)
    assert model.model.rope_deltas is None
    assert torch.equal(model(inputs_embeds=embeds).logits, before)
