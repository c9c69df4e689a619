"""DPOTrainer on prompts with images: the step against a loop over each sequence alone, and what surrounds it."""

import copy
import io
import pickle

import pytest
import torch
from datasets import Dataset, Image, IterableDataset, List
from transformers import AutoProcessor

from dpofast.data.token_rows import as_numpy
from dpofast.training.data.media import with_media
from dpofast.training.log_window import step_flops
from tests.support.tiny import tiny_dataset, tiny_model, tiny_tokenizer
from tests.support.tiny_training import losses_of, weights_of
from tests.support.vision_models import vision_model
from tests.support.vision_processors import tokenizer_of
from tests.support.vision_training import (
    image_dataset,
    image_pairs,
    image_trainer,
    loop,
    tower_of,
    tower_rows,
)

pytestmark = pytest.mark.slow(250)


def assert_same_weights(ours, theirs, close=1e-5):
    for (name, own), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if not name.endswith("k_proj.bias"):  # it changes no attention: AdamW scales up the rounding of a gradient of 0
            torch.testing.assert_close(own, other, atol=close, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    "family, padded", [("qwen3_vl", False), ("llava", False), ("idefics3", False), ("gemma3", True)]
)
def test_steps_equal_a_loop_over_each_sequence_alone(tmp_path, family, padded):
    expected = loop(family, image_pairs(family), 2, epochs=2)
    trainer = image_trainer(
        tmp_path, family, per_device_train_batch_size=2, num_train_epochs=2, padded=padded, max_tokens=120
    )  # fmt: skip
    trainer.train()
    assert len(losses_of(trainer)) == 10
    assert losses_of(trainer) == pytest.approx(expected.losses, abs=1e-5)
    assert_same_weights(trainer.model, expected.model)


def test_the_tower_sees_the_images_of_a_prompt_once_in_a_micro_batch(tmp_path):
    trainer = image_trainer(tmp_path, "llava", per_device_train_batch_size=9, precompute_ref_log_probs=False)
    (step,) = trainer.get_train_dataloader()
    (batch,) = trainer._training_packer.pack(step, None)
    rows, rows_of_ref = tower_rows(trainer.model), tower_rows(trainer.ref_model)
    trainer.train()
    # three pairs ask alike of one picture, with which the prompt of three pictures begins: 1 + 2, and 1 + 2 + 1 others
    assert rows == rows_of_ref == [7]
    prompts = {tuple(row["prompt_ids"]) + tuple(map(id, row["images"])): row for row in image_pairs("llava")}
    tokens = {key: len(row["prompt_ids"]) for key, row in prompts.items()}
    assert len(tokens) < 9
    assert batch.num_tokens < sum(len(row["prompt_ids"]) for row in image_pairs("llava"))


def test_workers_change_nothing(tmp_path):
    runs = []
    for workers in (0, 2):
        trainer = image_trainer(
            tmp_path / str(workers), "llava", dataloader_num_workers=workers, precompute_ref_log_probs=False
        )
        trainer.train()
        runs.append((losses_of(trainer), weights_of(trainer)))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])


def test_pixels_of_a_step_are_made_once_for_each_list_of_images(tmp_path):
    trainer = image_trainer(tmp_path, "llava", per_device_train_batch_size=9, precompute_ref_log_probs=False)
    images = pickle.loads(pickle.dumps(trainer._data.images))
    rows = list(as_numpy(trainer.train_dataset))
    asked = []
    images.encode, encode = lambda *given: asked.append(given) or encode(*given), images.encode
    examples = list(rows)
    with_media(examples, images)
    assert len(asked) == 5 and len(rows) == 9
    assert examples[0]["media"] is examples[3]["media"] is examples[5]["media"]
    assert examples[1]["media"] is None
    assert not {"images", "image_keys", "image_tokens", "image_token_id"} & examples[0].keys()


@pytest.mark.parametrize("options", [
    {"max_tokens": 60},
    {"gradient_checkpointing": True},
    {"torch_compile": True, "torch_compile_backend": "eager"},
    {"share": "none"},
])  # fmt: skip
@pytest.mark.parametrize("family", ["qwen3_vl", "llava"])
def test_memory_options_change_rounding_alone(tmp_path, family, options):
    plain = image_trainer(tmp_path / "plain", family, precompute_ref_log_probs=False)
    other = image_trainer(tmp_path / "other", family, precompute_ref_log_probs=False, **options)
    for trainer in (plain, other):
        trainer.train()
    assert losses_of(other) == pytest.approx(losses_of(plain), abs=1e-5)
    assert_same_weights(other.model, plain.model)


def test_mixed_precision_is_near_float32(tmp_path):
    plain = image_trainer(tmp_path / "plain", "qwen3_vl", precompute_ref_log_probs=False)
    mixed = image_trainer(tmp_path / "mixed", "qwen3_vl", precompute_ref_log_probs=False, bf16=True)
    for trainer in (plain, mixed):
        trainer.train()
    assert losses_of(mixed) == pytest.approx(losses_of(plain), abs=0.05)


@pytest.mark.parametrize("family", ["qwen3_vl", "llava"])
def test_a_frozen_tower_stays_as_it_is_and_keeps_no_activations(tmp_path, family):
    frozen = ("visual.blocks", "visual.patch_embed", "visual.pos_embed", "vision_tower")
    expected = loop(family, image_pairs(family), 4, frozen=frozen)
    trainer = image_trainer(tmp_path, family, freeze_vision_tower=True, precompute_ref_log_probs=False)
    tracked = []
    tower_of(trainer.model).register_forward_hook(
        lambda module, args, output: tracked.append(output.last_hidden_state.requires_grad)
    )
    trainer.train()
    assert losses_of(trainer) == pytest.approx(expected.losses, abs=1e-5)
    assert_same_weights(trainer.model, expected.model, close=3e-5)
    moved = {
        name
        for (name, now), (_, then) in zip(
            trainer.model.named_parameters(), vision_model(family).named_parameters(), strict=True
        )
        if not torch.equal(now, then)
    }
    assert not any(name.removeprefix("model.").startswith(frozen) for name in moved)
    assert any("merger" in name or "projector" in name for name in moved)
    assert tracked and not any(tracked)


def test_text_freezes_what_images_reach(tmp_path):
    train = Dataset.from_list([{**row, "images": []} for row in image_pairs("llava", images=[[]])])
    trainer = image_trainer(tmp_path, "llava", train=train.remove_columns("images"))
    assert not any(parameter.requires_grad for parameter in tower_of(trainer.model).parameters())
    assert not any(p.requires_grad for p in trainer.model.model.multi_modal_projector.parameters())


def test_an_adapter(tmp_path, capsys):
    from peft import LoraConfig

    runs = []
    for live in (True, False):
        trainer = image_trainer(
            tmp_path / str(live), "llava", peft_config=LoraConfig(r=4, target_modules="all-linear"),
            precompute_ref_log_probs=not live,
        )  # fmt: skip
        trainer.train()
        runs.append(losses_of(trainer))
    assert "vision tower: adapter, projector: adapter, language model: adapter" in capsys.readouterr().err
    assert runs[0][0] == pytest.approx(0.693147, abs=1e-5)
    assert runs[0] == pytest.approx(runs[1], abs=1e-5)
    adapters = [name for name, p in trainer.model.named_parameters() if "vision_tower" in name and p.requires_grad]
    assert adapters and all("lora" in name for name in adapters)
    others = LoraConfig(r=4, target_modules=r".*language_model.*\.(q|v)_proj")
    image_trainer(tmp_path / "text", "llava", peft_config=others, precompute_ref_log_probs=False)
    assert "vision tower: frozen, projector: frozen, language model: adapter" in capsys.readouterr().err


def test_a_separate_reference(tmp_path):
    ref = vision_model("llava")
    with torch.no_grad():
        ref.model.multi_modal_projector.linear_1.weight.mul_(1.5)
    runs = []
    for live in (True, False):
        trainer = image_trainer(
            tmp_path / str(live), "llava", ref_model=copy.deepcopy(ref), precompute_ref_log_probs=not live
        )
        trainer.train()
        runs.append(losses_of(trainer))
    assert runs[0] == pytest.approx(runs[1], abs=1e-5)
    assert abs(runs[0][0] - 0.693147) > 1e-4


def test_neftune_puts_noise_on_text_alone(tmp_path):
    alpha, seen = 5.0, []
    trainer = image_trainer(
        tmp_path, "llava", per_device_train_batch_size=9, neftune_noise_alpha=alpha, precompute_ref_log_probs=False,
        learning_rate=0.0,
    )  # fmt: skip
    model = trainer.model

    def keep(module, args, given):
        if module.training:
            seen.append(given["inputs_embeds"].detach()[0])

    model.model.language_model.register_forward_pre_hook(keep, with_kwargs=True)
    trainer.train()
    (step,) = trainer.get_train_dataloader()
    (batch,) = trainer._training_packer.pack(step, None)
    model.eval()
    plain = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, given: plain.append(given["inputs_embeds"].detach()[0]), with_kwargs=True
    )
    with torch.no_grad():
        model(packed=batch)
    (noisy,), (clean,) = seen, plain
    of_image = batch.media.image_of_row >= 0
    torch.testing.assert_close(noisy[of_image], clean[of_image], atol=1e-5, rtol=0)
    noise = (noisy - clean)[~of_image].abs()
    own = batch.segments.cu_seqlens_q.diff().long()
    bound = alpha / ((own + 1).repeat_interleave(own) * clean.shape[-1])[~of_image].sqrt()
    assert (noise.amax(1) <= bound + 1e-6).all() and (noise.amax(1) > 0.5 * bound).all()


def test_a_step_that_runs_out_of_memory_is_done_again(tmp_path):
    plain = image_trainer(tmp_path / "plain", "llava", precompute_ref_log_probs=False)
    plain.train()
    trainer = image_trainer(tmp_path / "short", "llava", precompute_ref_log_probs=False)
    failed = []

    def short(module, args, options):
        if module.training and len(failed) < 1:
            failed.append(1)
            raise torch.OutOfMemoryError("of the tower")

    tower_of(trainer.model).register_forward_pre_hook(short, with_kwargs=True)
    trainer.train()
    assert failed and trainer.max_tokens < plain.max_tokens
    assert losses_of(trainer) == pytest.approx(losses_of(plain), abs=1e-5)
    assert_same_weights(trainer.model, plain.model)


def test_max_tokens_auto_probes_with_images(tmp_path):
    trainer = image_trainer(tmp_path, "llava", max_tokens="auto", precompute_ref_log_probs=False)
    rows = tower_rows(trainer.model)
    assert trainer.max_tokens >= 1 and rows == []
    trainer.train()


def test_evaluation_keeps_no_pixels(tmp_path):
    trainer = image_trainer(
        tmp_path, "llava", evaluation=image_dataset("llava", 4, seed=1), precompute_ref_log_probs=False
    )
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(0.693147, abs=1e-5)
    records = trainer.pair_records["eval"]
    kept = [*records.best(), *records.worst()]
    assert kept and all("media" not in pair.example for pair in kept)
    for pair in kept:
        assert pair.example["image_keys"] == trainer.eval_dataset[pair.example["index"]]["image_keys"]
    assert trainer.predict(image_dataset("llava", 3)).metrics["test_loss"] == pytest.approx(0.693147, abs=1e-5)


def test_a_stream(tmp_path):
    plain = image_trainer(tmp_path / "plain", "llava", precompute_ref_log_probs=False, max_steps=3)
    rows = image_dataset("llava")
    stream = IterableDataset.from_generator(lambda: iter(rows), features=rows.features)
    streamed = image_trainer(tmp_path / "stream", "llava", train=stream, max_steps=3)
    for trainer in (plain, streamed):
        trainer.train()
    assert losses_of(streamed) == losses_of(plain)
    assert torch.equal(weights_of(streamed), weights_of(plain))


@pytest.mark.parametrize("mapped", [False, True])
def test_a_stream_of_jpegs_is_not_encoded_anew(tmp_path, mapped):
    def jpeg(image):
        image.save(file := io.BytesIO(), "JPEG", quality=60)
        return {"bytes": file.getvalue(), "path": None}

    pairs = [{**row, "images": [jpeg(image) for image in row["images"]]} for row in image_pairs("llava", 4)]
    rows = image_dataset("llava", rows=pairs)
    stream = rows.to_iterable_dataset()
    plain = image_trainer(tmp_path / "plain", "llava", train=rows, precompute_ref_log_probs=False, max_steps=1)
    streamed = image_trainer(
        tmp_path / "stream", "llava", train=stream.map(lambda row: row) if mapped else stream, max_steps=1
    )
    for trainer in (plain, streamed):
        trainer.train()
    assert torch.equal(weights_of(streamed), weights_of(plain))


def test_a_text_model_takes_a_column_without_images(tmp_path):
    plain = tiny_dataset()
    rows = plain.add_column("images", [None] * len(plain), feature=List(Image()))
    trainers = [
        image_trainer(
            tmp_path / str(number), "llava", model=tiny_model(), train=train, processing_class=tiny_tokenizer(),
            precompute_ref_log_probs=True,
        )
        for number, train in enumerate((rows, plain))
    ]  # fmt: skip
    for trainer in trainers:
        trainer.train()
    assert losses_of(trainers[0]) == losses_of(trainers[1])


def test_a_killed_run_goes_on_to_the_last_bit(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "precompute_ref_log_probs": False}
    whole = image_trainer(tmp_path / "whole", "llava", **options)
    whole.train()
    again = image_trainer(tmp_path / "again", "llava", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(weights_of(again), weights_of(whole))
    assert losses_of(again) == losses_of(whole)
    processor = AutoProcessor.from_pretrained(tmp_path / "whole" / "checkpoint-2")
    assert type(processor).__name__ == "LlavaProcessor"


def test_a_run_is_not_resumed_with_other_images(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "precompute_ref_log_probs": False}
    image_trainer(tmp_path, "llava", max_steps=1, **options).train()
    rows = image_pairs("llava")
    rows[7]["images"] = []
    rows[8]["images"] = rows[0]["images"]
    changed = image_trainer(
        tmp_path / "other", "llava", train=image_dataset("llava", rows=rows), max_steps=1, **options
    )
    with pytest.raises(ValueError, match=r"written by another run: train_dataset was .*pass the data as it was"):
        changed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_changes_during_the_run_stops_it_with_its_row(tmp_path, workers):
    file = tmp_path / "picture.png"
    rows = image_pairs("llava")
    rows[8]["images"][0].save(file)
    stored = []
    for row in rows:
        encoded = []
        for image in row["images"]:
            data = io.BytesIO()
            image.save(data, "png")
            encoded.append({"bytes": data.getvalue(), "path": None})
        stored.append({**row, "images": encoded})
    stored[8]["images"] = [{"bytes": None, "path": str(file)}]
    trainer = image_trainer(
        tmp_path / "run", "llava", train=Dataset.from_list(stored), precompute_ref_log_probs=False,
        dataloader_num_workers=workers,
    )  # fmt: skip
    rows[0]["images"][0].rotate(90).save(file)
    with pytest.raises(ValueError, match=r"^row 8 of the data: its images .*are others than when it was tokenized"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_what_is_refused(tmp_path):
    rows = image_dataset("llava")
    with pytest.raises(ValueError, match=r"train_dataset: it has images: expected the model's processor .* got a tok"):
        image_trainer(tmp_path, "llava", processing_class=tokenizer_of("llava"))
    with pytest.raises(ValueError, match=r"it has images: LlamaForCausalLM: images of llama models are not supported"):
        image_trainer(tmp_path, "llava", model=tiny_model())
    with pytest.raises(ValueError, match=r"Gemma3ForConditionalGeneration: packed rows with images .*padded=True"):
        image_trainer(tmp_path, "gemma3")
    with pytest.raises(ValueError, match=r"ref_model: LlamaForCausalLM: images of llama"):
        image_trainer(tmp_path, "llava", ref_model=tiny_model())
    with pytest.raises(ValueError, match=r"ref_model: expected a model of the policy's type llava, .* got qwen2_vl"):
        image_trainer(tmp_path, "llava", ref_model=vision_model("qwen2_vl"))
    stream = IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(ValueError, match="train_dataset: it has images: expected the model's processor"):
        image_trainer(tmp_path, "llava", train=stream, processing_class=None, max_steps=1)
    with pytest.raises(ValueError, match="freeze_vision_tower: LlamaForCausalLM has no vision tower"):
        image_trainer(
            tmp_path, "llava", model=tiny_model(), train=tiny_dataset(), processing_class=None, freeze_vision_tower=True
        )
    with pytest.raises(ValueError, match=r"eval data: it has images: LlamaForCausalLM"):
        image_trainer(
            tmp_path, "llava", model=tiny_model(), train=tiny_dataset(), processing_class=tiny_tokenizer(),
            evaluation=rows,
        )  # fmt: skip


def test_work_is_counted_of_the_language_model():
    model = vision_model("llava")
    embeddings, head = model.model.language_model.embed_tokens.weight.numel(), model.lm_head.weight.numel()
    backbone = sum(p.numel() for p in model.model.language_model.parameters()) - embeddings
    assert step_flops(model, 100, 7) == 6 * (100 * backbone + 7 * head)


def test_a_projector_that_trains_beside_an_adapter(tmp_path):
    from peft import LoraConfig

    runs = []
    for live in (True, False):
        config = LoraConfig(
            r=4, target_modules=r".*language_model.*\.(q|v)_proj", modules_to_save=["multi_modal_projector"]
        )
        trainer = image_trainer(tmp_path / str(live), "llava", peft_config=config, precompute_ref_log_probs=not live)
        trainer.train()
        runs.append(losses_of(trainer))
    assert runs[0][0] == pytest.approx(0.693147, abs=1e-5)
    assert runs[0] == pytest.approx(runs[1], abs=1e-5)
    saved, original = (
        dict(trainer.model.named_parameters())[f"base_model.model.model.multi_modal_projector.{place}linear_1.weight"]
        for place in ("modules_to_save.default.", "original_module.")
    )
    assert not torch.equal(saved, original)
