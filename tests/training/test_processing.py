"""What reads the rows of a run: processors, tokenizers, and data that a processor alone can read."""

import pytest
import torch
from datasets import Dataset

from dpofast import DPOConfig, DPOTrainer
from tests.support.tiny import tiny_model
from tests.support.tiny_training import losses_of
from tests.support.vision_models import vision_model
from tests.support.vision_processors import processor_of, tokenizer_of
from tests.support.vision_training import image_dataset, image_pairs, image_trainer, tower_of, tower_rows

pytestmark = pytest.mark.slow(60)


def test_a_processor_serves_a_text_model_as_its_tokenizer_does(tmp_path):
    rows = Dataset.from_list([{"prompt": "ask ", "chosen": "yes", "rejected": "no"}] * 4)
    trainers = [
        image_trainer(tmp_path, "llava", model=tiny_model(), train=rows, processing_class=each)
        for each in (processor_of("llava"), tokenizer_of("llava"))
    ]
    tokens = [trainer.train_dataset.to_list() for trainer in trainers]
    assert tokens[0] == tokens[1]


def test_conversations_of_text_are_written_by_the_processors_template(tmp_path):
    ask = [{"role": "user", "content": "what?"}]
    answers = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    rows = Dataset.from_list([{"prompt": ask, **answers}] * 4)
    processor = processor_of("llava")
    assert processor.tokenizer.chat_template is None
    trainer = image_trainer(tmp_path, "llava", train=rows, processing_class=processor)
    expected = processor.apply_chat_template(ask, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert trainer.train_dataset[0]["prompt_ids"] == torch.tensor(expected["input_ids"]).flatten().tolist()


def test_images_that_a_transform_opens(tmp_path):
    drawn = image_pairs("llava")
    rows = Dataset.from_list([{**row, "images": None, "at": at} for at, row in enumerate(drawn)])
    rows = rows.remove_columns("images")

    def opens(batch):
        return {**batch, "images": [drawn[at]["images"] for at in batch["at"]]}

    made = image_trainer(tmp_path / "made", "llava", train=rows.with_transform(opens))
    assert all(p.requires_grad for p in tower_of(made.model).parameters())
    runs = [image_trainer(tmp_path / "own", "llava"), made]
    for trainer in runs:
        trainer.train()
    assert losses_of(runs[0]) == losses_of(runs[1])
    with pytest.raises(ValueError, match="train_dataset: it has images: expected the model's processor"):
        image_trainer(tmp_path, "llava", train=rows.with_transform(opens), processing_class=tokenizer_of("llava"))


def test_the_identity_of_a_processors_vocabulary_is_its_tokenizers(tmp_path):
    trainer = image_trainer(tmp_path, "llava", precompute_ref_log_probs=False)
    expected = trainer.run_identity()["tokenizer"]
    trainer.processing_class = tokenizer_of("llava")
    trainer.processing_class.tokenizer = object()  # that of mistral_common's tokenizers is no tokenizer of transformers
    assert trainer.run_identity()["tokenizer"] == expected


def test_evaluation_alone(tmp_path):
    args = DPOConfig(output_dir=str(tmp_path), report_to="none", disable_tqdm=True, use_cpu=True)
    given = {"eval_dataset": image_dataset("llava", 4), "processing_class": processor_of("llava")}
    trainer = DPOTrainer(vision_model("llava"), args=args, **given)
    rows = tower_rows(trainer.model)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert rows


def test_a_tokenizer_without_pads(tmp_path):
    processor = processor_of("qwen2_vl")
    processor.tokenizer.pad_token = None
    runs = [
        image_trainer(tmp_path, "qwen2_vl", processing_class=each) for each in (processor, processor_of("qwen2_vl"))
    ]
    for trainer in runs:
        trainer.train()
    assert losses_of(runs[0]) == losses_of(runs[1])


def test_the_processor_beside_a_model_is_loaded(tmp_path):
    folder = str(tmp_path / "model")
    vision_model("llava").save_pretrained(folder)
    processor_of("llava").save_pretrained(folder)
    trainer = image_trainer(
        tmp_path / "run", "llava", model=folder, processing_class=None, precompute_ref_log_probs=False
    )
    assert type(trainer.processing_class).__name__ == "LlavaProcessor"
    expected = image_trainer(tmp_path / "own", "llava", precompute_ref_log_probs=False)
    for each in (trainer, expected):
        each.train()
    assert losses_of(trainer) == losses_of(expected)


def test_text_goes_on_where_the_processor_cannot_be_loaded(tmp_path):
    folder = str(tmp_path / "model")
    vision_model("qwen2_vl").save_pretrained(folder)
    processor = processor_of("qwen2_vl")
    processor.image_processor.save_pretrained(folder)  # with the tokenizer, the parts that need no torchvision
    processor.tokenizer.save_pretrained(folder)
    rows = Dataset.from_list([{"prompt": "ask ", "chosen": "yes", "rejected": "no"}] * 4)
    image_trainer(tmp_path / "run", "qwen2_vl", model=folder, train=rows, processing_class=None).train()
    with pytest.raises(ValueError, match="the one beside the model could not be loaded: .*Torchvision"):
        image_trainer(tmp_path / "run", "qwen2_vl", model=folder, processing_class=None)
