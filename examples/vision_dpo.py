"""DPO on pictures: a tiny random vision-language model learns to prefer the right description of a drawing.

    python examples/vision_dpo.py                      about a minute on two cores
    python examples/vision_dpo.py --output drawings    also writes pictures, pairs and results there

A picture holds one to three circles, squares or triangles of one colour. The chosen response says which, the rejected
one has another number, colour or shape. Pairs come in twos that have the same two responses with the roles exchanged,
so that no rule about the text alone is right more than half of the time. Held-out accuracy is printed before and after
training, and then without the picture (a blank one in its place) and with the two pictures of such twins exchanged.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from PIL import Image, ImageDraw
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    PrinterCallback,
)

from dpofast import DPOConfig, DPOTrainer, attach_logprob_head, pack, sequence_logprobs, vision_inputs

SIZE, PATCH = 32, 8  # pixels: 16 patches, each a placeholder
NUMBERS = ("one", "two", "three")
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220), "yellow": (230, 210, 40)}
SHAPES = ("circle", "square", "triangle")
QUESTION = "what is in the picture ?"
SPECIAL = ("<pad>", "<end>", "<unk>", "<image>", "<user>", "<assistant>")
WORDS = (*SPECIAL, *QUESTION.split(), *NUMBERS, *COLOURS, *SHAPES, *(f"{shape}s" for shape in SHAPES))
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<image> {% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% if m['role'] == 'assistant' %} <end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def draw_picture(number, colour, shape, draw):
    """A picture of these shapes, their places and sizes drawn at random."""
    picture = Image.new("RGB", (SIZE, SIZE), tuple(draw.randint(200, 255) for _ in range(3)))
    pen, cell = ImageDraw.Draw(picture), SIZE // 2
    for left, top in draw.sample([(x, y) for x in (0, cell) for y in (0, cell)], NUMBERS.index(number) + 1):
        size = draw.randint(cell - 5, cell - 1)
        left, top = left + draw.randint(0, cell - size), top + draw.randint(0, cell - size)
        right, bottom = left + size - 1, top + size - 1
        if shape == "circle":
            pen.ellipse((left, top, right, bottom), COLOURS[colour])
        elif shape == "square":
            pen.rectangle((left, top, right, bottom), COLOURS[colour])
        else:
            pen.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], COLOURS[colour])
    return picture


def make_pairs(count, seed, *, differ_in=(0, 1, 2)):
    """Rows in TRL's vision format, 2 * i and 2 * i + 1 twins; their responses differ in number, colour or shape."""
    draw = random.Random(seed)
    values = (NUMBERS, tuple(COLOURS), SHAPES)
    prompt = [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": QUESTION}]}]
    rows = []
    for twins in range(count // 2):
        one = [draw.choice(each) for each in values]
        part = differ_in[twins % len(differ_in)]
        other = [*one]
        other[part] = draw.choice([value for value in values[part] if value != one[part]])
        for right, wrong in ((one, other), (other, one)):
            chosen, rejected = ([{"role": "assistant", "content": described(*which)}] for which in (right, wrong))
            rows.append(
                {"images": [draw_picture(*right, draw)], "prompt": prompt, "chosen": chosen, "rejected": rejected}
            )
    return rows


def described(number, colour, shape):
    """The text of a response."""
    return f"{number} {colour} {shape if number == 'one' else shape + 's'}"


def make_processor():
    """The model's processor: a token a word; pixels of one size."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
        ),
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    )


def make_model():
    """A random LLaVA of 0.2 million weights, the same at every call."""
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaConfig(
        text_config={
            "model_type": "llama",
            **size,
            "vocab_size": len(WORDS),
            "pad_token_id": WORDS.index("<pad>"),
            "eos_token_id": WORDS.index("<end>"),
            "bos_token_id": None,
            "initializer_range": 0.1,
        },
        vision_config={"model_type": "siglip_vision_model", **size, "image_size": SIZE, "patch_size": PATCH},
        image_token_id=WORDS.index("<image>"),
        image_seq_length=(SIZE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return AutoModelForImageTextToText.from_config(config)


@torch.no_grad()
def accuracy(model, processor, rows, pictures=None):
    """Part of the rows whose chosen response has the higher log-prob; with `pictures` in place of their own."""
    inputs, examples = vision_inputs(model), []
    for index, row in enumerate(rows):
        picture = row["images"][0] if pictures is None else pictures[index]
        text = processor.apply_chat_template(row["prompt"], add_generation_prompt=True)
        processed = processor(text=[text], images=[[picture]], return_tensors="pt")
        prompt_ids = processed["input_ids"][0]
        responses = {
            f"{side}_ids": processor.tokenizer(row[side][0]["content"] + " <end>").input_ids
            for side in ("chosen", "rejected")
        }
        media = inputs.of_prompt(prompt_ids, processed)
        examples.append({"prompt_ids": prompt_ids, **responses, "media": media})
    right = 0
    for batch in pack(examples, max_tokens=4096):
        logps = sequence_logprobs(model(packed=batch), batch)
        chosen, rejected = logps[batch.pairs.long()].unbind(1)
        right += int((chosen > rejected).sum())
    return right / len(rows)


def train(model, processor, pairs, folder, *, epochs):
    """DPO from random weights; the loss of every epoch."""
    args = DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=32,
        num_train_epochs=epochs,
        learning_rate=2e-3,
        warmup_steps=10,
        beta=0.5,
        logging_strategy="epoch",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = DPOTrainer(model, args=args, train_dataset=Dataset.from_list(pairs), processing_class=processor)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def write(folder, rows, results):
    """Pictures as PNG, the pairs as JSON lines with their paths, and the results."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as lines:
        for index, row in enumerate(rows):
            row["images"][0].save(folder / f"{index:04}.png")
            lines.write(json.dumps({**row, "images": [f"{index:04}.png"]}) + "\n")
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def main(argv=None):
    """Draw, train and print; returns the results."""
    parser = argparse.ArgumentParser(description="DPO of a tiny vision-language model on drawn pictures.")
    parser.add_argument("--quick", action="store_true", help="fewer pairs, which differ in colour alone: seconds")
    parser.add_argument("--output", type=Path, help="folder for the held-out pictures, their pairs and the results")
    args = parser.parse_args(argv)
    count, epochs, differ_in = (128, 4, (1,)) if args.quick else (512, 12, (0, 1, 2))
    pairs, held_out = (make_pairs(number, seed, differ_in=differ_in) for seed, number in enumerate((count, count // 2)))
    model, processor = make_model(), make_processor()
    attach_logprob_head(model)
    results = {"accuracy_before": accuracy(model, processor, held_out)}
    print(f"held-out accuracy before: {results['accuracy_before']:.2f}")
    with tempfile.TemporaryDirectory() as folder:
        losses = train(model, processor, pairs, folder, epochs=epochs)
    pictures = [row["images"][0] for row in held_out]
    blank = [Image.new("RGB", (SIZE, SIZE), "white")] * len(held_out)
    exchanged = [pictures[index ^ 1] for index in range(len(held_out))]
    results["accuracy_after"] = accuracy(model, processor, held_out)
    results["accuracy_blank"] = accuracy(model, processor, held_out, blank)
    results["accuracy_exchanged"] = accuracy(model, processor, held_out, exchanged)
    print(
        f"after: {results['accuracy_after']:.2f}, with blank pictures {results['accuracy_blank']:.2f}, "
        f"with those of two twins exchanged {results['accuracy_exchanged']:.2f}"
    )
    results["losses"] = losses
    print(f"losses of the epochs: {[round(loss, 3) for loss in losses]}")
    if args.output is not None:
        write(args.output, held_out, results)
    return results


if __name__ == "__main__":
    main()
