"""trl's DPOTrainer on vision-language models under patch_trl(): the run is trl's, and every image is seen once."""

import pickle
from contextlib import contextmanager

import pytest
import torch
import trl.trainer.dpo_trainer as trl_module
from datasets import Dataset
from datasets import Image as ImageFeature
from datasets import List as ListFeature
from peft import LoraConfig
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

from dpofast.integrations._trl.forward import fuse
from dpofast.integrations._trl.scores import FusedOptions
from dpofast.integrations.trl import patch_trl, report, unpatch_trl
from tests.support.trl_cases import Gradients, assert_same_run, build
from tests.support.vision_models import _SIGLIP, _TEXT, IMAGE, vision_model
from tests.support.vision_processors import picture, processor_of

pytestmark = pytest.mark.slow(60)

PLAIN = trl_module.DataCollatorForVisionPreference
# How many images each row has; rows 1 and 4 have the same one, and so have two of row 3
COUNTS = (1, 1, 0, 2, 1, 2, 0, 1, 2, 1, 0, 1)
SIZES = ((20, 30), (33, 12), (16, 16), (12, 40))


@pytest.fixture(autouse=True)
def unpatched():
    """Every test begins with trl as it is, and leaves it so."""
    unpatch_trl()
    yield
    unpatch_trl()


def pictures(row, count):
    """The images of a row."""
    numbers = {1: [1], 4: [1], 3: [7, 7]}.get(row, [10 * row + i for i in range(count)])
    return [picture(number, *SIZES[number % len(SIZES)]) for number in numbers[:count]]


def vision_pairs(counts=COUNTS):
    """Conversations in trl's vision format with these numbers of images."""

    def said(role, text):
        return [{"role": role, "content": text}]

    rows = [
        {
            "prompt": said("user", f"what is {'it' if row in (1, 4) else row} here?"),
            "chosen": said("assistant", f"a cat of {row}."),
            "rejected": said("assistant", f"a dog, {'no' * (row % 3)}"),
            "images": pictures(row, count),
        }
        for row, count in enumerate(counts)
    ]
    return Dataset.from_list(rows).cast_column("images", ListFeature(ImageFeature()))


def run(folder, family, *, patched, train=True, **options):
    """Train a tiny model for 3 steps: the trainer, its first gradients and the patch's report."""
    gradients = Gradients()
    if patched:
        patch_trl()
    try:
        torch.manual_seed(0)
        trainer = build(
            folder,
            callbacks=[gradients],
            **{
                "model": vision_model(family),
                "processor": processor_of(family),
                "data": vision_pairs(),
                "max_steps": 3,
                "max_length": None,
                **options,
            },
        )
        if train:
            trainer.train()
        return trainer, gradients.first, report()
    finally:
        unpatch_trl()


def assert_equal_runs(folder, family, *, metrics=1e-4, **options):
    """Run with and without the patch, compare, and return the patched trainer and the report."""
    plain, plain_gradients, _ = run(folder / "plain", family, patched=False, **options)
    fast, gradients, text = run(folder / "fast", family, patched=True, **options)
    assert_same_run((plain, plain_gradients), (fast, gradients), metrics=metrics)
    losses = [[log["loss"] for log in each.state.log_history if "loss" in log] for each in (plain, fast)]
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], abs=1e-5)
    return fast, text


@contextmanager
def seen_by_the_tower(model, name):
    """The first dimension of what the vision tower is called with, a call."""
    seen = []
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs.get("grid_thw", kwargs.get("pixel_values", args and args[0])))),
        with_kwargs=True,
    )
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "llava", "llava_next", "idefics3"])
def test_a_packed_run_is_trls(family, tmp_path):
    _, text = assert_equal_runs(tmp_path, family)
    assert "padded:" not in text and "6 x packed" in text
    assert text.count(": packed\n") == 2


@pytest.mark.parametrize(
    "options",
    [
        {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)},
        {"gradient_checkpointing": False},
        {"dataloader_num_workers": 2},
        {"max_length": 47, "data": vision_pairs([1] * 12)},  # cuts responses, and no image
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "ld_alpha": 0.5, "use_weighting": False},
    ],
    ids=["lora", "not checkpointed", "workers", "cut", "a mix of losses"],
)
def test_options_of_trl(options, tmp_path):
    _, text = assert_equal_runs(tmp_path, "qwen3_vl", **options)
    assert "padded:" not in text and "6 x packed" in text


def test_the_balancing_loss_of_experts(tmp_path):
    _, text = assert_equal_runs(tmp_path, "qwen3_vl_moe", router_aux_loss_coef=0.1)
    assert "padded:" not in text


def test_evaluation(tmp_path):
    options = {"eval_data": vision_pairs([2, 0, 1]), "eval_strategy": "steps", "eval_steps": 2}
    fast, _ = assert_equal_runs(tmp_path, "qwen2_vl", **options)
    assert any("eval_loss" in log for log in fast.state.log_history)


def test_every_distinct_image_is_seen_once(tmp_path):
    """Rows 0, 1, 3 and 4: one image, one, two equal ones after each other, and that of row 1 with its prompt."""
    rows = [0, 1, 3, 4]
    batches = {}
    for patched in (False, True):
        if patched:
            patch_trl()
        trainer, _, _ = run(tmp_path, "qwen3_vl", patched=patched, train=False)
        batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[row] for row in rows]))
        with seen_by_the_tower(trainer.model, "model.visual") as seen, torch.no_grad():
            batches[patched] = float(trainer.compute_loss(trainer.model, batch))
        assert seen == ([4] if patched else [10])
    assert batches[True] == pytest.approx(batches[False], abs=1e-5)


def test_the_report_counts_images(tmp_path):
    patch_trl()
    *_, text = run(tmp_path, "llava", patched=True, max_steps=1, data=vision_pairs([1] * 4))
    assert text.splitlines()[1:] == [
        "model LlavaForConditionalGeneration: packed",
        "model LlavaForConditionalGeneration: packed",
        "2 x packed",
        "16 x images of padded rows",
        "8 x images that the vision tower saw for them",
    ]


class TestWherePackingIsImpossible:
    """Gemma 3 attends in both directions inside an image."""

    def test_the_padded_run_is_trls(self, tmp_path):
        message = "Gemma3ForConditionalGeneration keeps trl's padded forward.*both directions inside an image"
        with pytest.warns(UserWarning, match=message):
            _, text = assert_equal_runs(tmp_path, "gemma3", data=vision_pairs([1, 2, 1, 1] * 3))
        reason = "packed rows with images are not supported, as it attends in both directions inside an image"
        assert f"Gemma3ForConditionalGeneration: packed; batches with images padded, because {reason}" in text
        assert f"6 x padded: {reason}\n" in text + "\n"

    def test_it_is_refused_on_demand(self, tmp_path):
        patch_trl(on_unpackable="raise")
        trainer = build(
            tmp_path, model=vision_model("gemma3"), processor=processor_of("gemma3"), data=vision_pairs([1] * 4)
        )
        with pytest.raises(
            ValueError, match="Gemma3ForConditionalGeneration: cannot run packed: packed rows with imag"
        ):
            trainer.train()

    def test_level_kernel(self, tmp_path):
        plain, gradients, _ = run(tmp_path / "plain", "qwen2_vl", patched=False)
        patch_trl(level="kernel")
        ours = Gradients()
        torch.manual_seed(0)
        trainer = build(
            tmp_path / "fast", model=vision_model("qwen2_vl"), processor=processor_of("qwen2_vl"),
            data=vision_pairs(), max_steps=3, max_length=None, callbacks=[ours],
        )  # fmt: skip
        trainer.train()
        assert_same_run((plain, gradients), (trainer, ours.first))
        assert trainer.data_collator.inputs is None  # nothing is read that nothing uses

    @pytest.mark.parametrize("patched", [False, True], ids=["trl", "patched"])
    def test_a_max_length_that_cuts_an_image_is_refused_in_trls_words(self, patched, tmp_path):
        with pytest.raises(ValueError, match=r"`max_length` \(8\) is too short and causes image placeholder"):
            run(tmp_path, "qwen3_vl", patched=patched, max_length=8, data=vision_pairs([1] * 4))


def test_paligemmas_images_reach_its_padded_forward():
    """It attends to the whole of its prompt: nothing of it can be packed."""
    text = {**_TEXT, "model_type": "gemma"}
    config = PaliGemmaConfig(text_config=text, vision_config=_SIGLIP, image_token_index=IMAGE, projection_dim=32)
    torch.manual_seed(0)
    model = PaliGemmaForConditionalGeneration(config).eval()
    with pytest.warns(UserWarning, match="PaliGemmaForConditionalGeneration keeps trl's padded forward.*whole of its"):
        assert "attends to the whole of its prompt" in fuse(model, FusedOptions("forward", "kernel"))
    ids = torch.cat((torch.full((2, 4), IMAGE), torch.randint(5, 60, (2, 8))), 1)
    types = (torch.arange(12) >= 7).long().repeat(2, 1)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(2, 3, 8, 8),
        "token_type_ids": types,
    }
    ours = model(**inputs, labels=ids.masked_fill(types == 0, -100), fused_lm_head=True, use_cache=False).log_probs
    theirs = model(**inputs).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0] * types[:, 1:]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


class TestTheCollator:
    def collated(self, family="idefics3", rows=(0, 2, 3)):
        """A batch of the patched collator, and trl's."""
        patch_trl()
        data, model = vision_pairs(), vision_model(family)
        trainer = build("unused", model=model, processor=processor_of(family), data=data, max_length=None)
        examples = [data[row] for row in rows]
        theirs = PLAIN(processor_of(family))([dict(example) for example in examples])
        return trainer.data_collator(examples), theirs

    def test_the_batch_is_trls_and_knows_its_images(self):
        ours, theirs = self.collated()
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            assert torch.equal(ours[name], value)
        images = [None if media is None else [image.key for image in media.images] for media in ours.rows.media]
        assert images[:3] == images[3:] and images[1] is None
        assert len(set(images[2])) == len(images[2]) // 2  # the same picture twice
        for moved in (ours.to("cpu"), pickle.loads(pickle.dumps(ours))):
            assert [media and media.images[0].key for media in moved.rows.media] == [
                keys and keys[0] for keys in images
            ]

    def test_pixels_that_are_written_to_are_read_again(self):
        ours, _ = self.collated()
        ours["pixel_values"][0] += 1
        assert ours.rows is None
        again, _ = self.collated()
        again["pixel_values"] = again["pixel_values"].clone()
        assert again.rows is None

    def test_a_collator_that_knows_nothing_of_it(self, tmp_path):
        """Images are then read in the model's call."""

        def changed(batch):
            batch["pixel_values"] = batch["pixel_values"] * 0.5
            return batch

        class Own(PLAIN):
            def torch_call(self, examples):
                return changed(super().torch_call(examples))

        fast, text = assert_equal_runs(tmp_path, "llava_next", data_collator=Own(processor_of("llava_next")))
        assert "padded:" not in text and isinstance(fast.data_collator, Own)
