"""DPOTrainer on tiny pairs with images, and the plain loop over each sequence alone that it must equal."""

import copy
import random
from dataclasses import dataclass

import torch
from datasets import Dataset, Features, Image, List, Value

from dpofast import DPOConfig, DPOTrainer
from tests.support.vision_models import IMAGE, vision_model
from tests.support.vision_processors import picture, processor_of

PATCHES = ("qwen2_vl", "qwen3_vl", "glm4v")  # of pixel_values a row a patch
_TOWERS = ("visual", "vision_tower", "vision_model")
_TOKEN_TYPES = {"gemma3": "token_type_ids", **dict.fromkeys(PATCHES, "mm_token_type_ids")}


def pictures():
    """Pictures of several sizes, of which some pairs have none, one or three, and some the same."""
    sizes = ((16, 16), (20, 36), (30, 12), (16, 24))
    drawn = [picture(seed, *sizes[seed % 4]) for seed in range(6)]
    return [[drawn[0]], [], drawn[:3], [drawn[0]], [drawn[3]], [drawn[0]], [drawn[4], drawn[0]], [], [drawn[5]]]


def image_pairs(family, count=9, *, images=None, seed=0):
    """Pairs: prompt_ids by the family's template, images and responses of random text."""
    processor, draw = processor_of(family), random.Random(seed)
    images, rows = pictures() if images is None else images, []
    for index in range(count):
        own = images[index % len(images)]
        # pairs of one picture ask alike, so that prompts are equal
        parts = [{"type": "image"} for _ in own] + [{"type": "text", "text": f"what of {len(own)}?"}]
        text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        ids = encoded(processor, text, own)["input_ids"][0].tolist()
        chosen, rejected = ([draw.randrange(5, 60) for _ in range(draw.randint(1, 6))] + [2] for _ in range(2))
        rows.append({"prompt_ids": ids, "chosen_ids": [3, *chosen], "rejected_ids": [4, *rejected], "images": own})
    return rows


def encoded(processor, text, images):
    """What the processor returns for a prompt."""
    given = {"images": [images]} if images else {}
    return processor(text=[text], **given, add_special_tokens=False, return_tensors="pt")


def image_dataset(family, count=9, *, rows=None, **options):
    """image_pairs, or such rows, as a Dataset."""

    ids = List(Value("int32"))
    features = {"prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids, "images": List(Image())}
    rows = image_pairs(family, count, **options) if rows is None else rows
    return Dataset.from_list(rows, features=Features(features))


def image_trainer(output_dir, family, *, model=None, train=None, **options):
    """A trainer on nine pairs, four a step."""
    own = {name: options.pop(name) for name in ("ref_model", "peft_config", "evaluation") if name in options}
    processing = options.pop("processing_class") if "processing_class" in options else processor_of(family)
    defaults = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
    }
    return DPOTrainer(
        vision_model(family) if model is None else model,
        ref_model=own.get("ref_model"),
        args=DPOConfig(output_dir=str(output_dir), **{**defaults, **options}),
        train_dataset=image_dataset(family) if train is None else train,
        eval_dataset=own.get("evaluation"),
        processing_class=processing,
        peft_config=own.get("peft_config"),
    )


@dataclass
class Loop:
    """What the plain loop returns: losses of the steps, and the model after them."""

    losses: list
    model: torch.nn.Module


def alone_logps(model, family, processor, row, response):
    """(n,) log-probs of a response by the model's own forward over its prompt, images and itself alone."""
    ids = torch.tensor([[*row["prompt_ids"], *response]])
    inputs = {}
    if row["images"]:
        text = (getattr(processor, "boi_token", None) or processor.image_token) * len(row["images"])
        inputs = {
            name: value
            for name, value in encoded(processor, text, row["images"]).items()
            if name not in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
        }
    if family in _TOKEN_TYPES and (row["images"] or family == "gemma3"):
        inputs[_TOKEN_TYPES[family]] = (ids == IMAGE).long()
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **inputs).logits
    scored = logits[0, len(row["prompt_ids"]) - 1 : -1].log_softmax(-1)
    return scored.gather(1, torch.tensor(response)[:, None])[:, 0]


def loop(family, rows, batch_size, *, epochs=1, lr=1e-3, beta=0.1, model=None, frozen=()):
    """Train DPO over rows in their order: each sequence alone, the loss's formula, AdamW."""
    policy = vision_model(family) if model is None else model
    ref, processor, losses = copy.deepcopy(policy), processor_of(family), []
    policy.train()
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    for start in [start for _ in range(epochs) for start in range(0, len(rows), batch_size)]:
        margins = []
        for row in rows[start : start + batch_size]:
            own, theirs = [], []
            for side in ("chosen_ids", "rejected_ids"):
                own.append(alone_logps(policy, family, processor, row, row[side]).sum())
                with torch.no_grad():
                    theirs.append(alone_logps(ref, family, processor, row, row[side]).sum())
            margins.append(own[0] - theirs[0] - own[1] + theirs[1])
        loss = -torch.nn.functional.logsigmoid(beta * torch.stack(margins)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return Loop(losses, policy)


def tower_of(model):
    """The vision tower."""
    return next(getattr(model.model, name) for name in _TOWERS if hasattr(model.model, name))


def tower_rows(model):
    """A list that grows by the rows of pixels in each call of the vision tower."""
    rows = []

    def count(module, args, options):
        rows.append(len(args[0] if args else options["pixel_values"]))

    tower_of(model).register_forward_pre_hook(count, with_kwargs=True)
    return rows
