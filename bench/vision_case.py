"""A small random Qwen3-VL, its processor, and pairs with drawn pictures, for bench/vision.py.

The backbone, the vision tower and the images are the same in every profile; only the vocabulary differs. One image is
20 x 30 tokens: 640 x 960 pixels, 2,400 patches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLProcessor,
)

from bench.cases import SEED
from bench.real_pairs import write_jsonl
from bench.sharing import unique_tokens
from bench.step_run import StepCase

SPECIAL = (
    "<pad>",
    "<end>",
    "<user>",
    "<assistant>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_ID = {token: place for place, token in enumerate(SPECIAL)}
PATCH, MERGE = 16, 2
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if m['role'] == 'assistant' %}<end>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class VisionProfile:
    """A model and the lengths of its pairs.

    Attributes:
        vocab_size: ids, each a word.
        image_tokens: rows and columns of an image's placeholders.
        question: least and most words of a prompt beside its image.
        response: least and most words of a response.
        hidden_size, layers: of the language model, with heads of 64 and a gated MLP of three times the width.
        tower_size, tower_layers: of the vision tower, with heads of 64 and an MLP of four times the width.
    """

    vocab_size: int
    image_tokens: tuple[int, int] = (20, 30)
    question: tuple[int, int] = (12, 24)
    response: tuple[int, int] = (45, 74)
    hidden_size: int = 256
    layers: int = 7
    tower_size: int = 128
    tower_layers: int = 2

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of an image."""
        rows, columns = self.image_tokens
        return rows * PATCH * MERGE, columns * PATCH * MERGE


VISION_PROFILES = {
    # Qwen3-VL's vocabulary: beside so narrow a backbone the head has a larger share than a real model's
    "qwen-vocab": VisionProfile(vocab_size=151_936),
    "32k": VisionProfile(vocab_size=32_000),
    # A position of the backbone, an image token's part of the tower, a row of the head cost 1 : 1.26 : 0.21, attention
    # included; of Qwen3-VL-2B, at these lengths, 1 : 1.23 : 0.21.
    "proportions": VisionProfile(vocab_size=5_600),
    "quick": VisionProfile(
        vocab_size=300, image_tokens=(3, 4), question=(3, 5), response=(4, 9), hidden_size=64, layers=1, tower_size=64
    ),
}


def write_model(folder: Path, profile: VisionProfile) -> None:
    """Save the model (float32 safetensors)."""
    text = {
        "vocab_size": profile.vocab_size,
        "hidden_size": profile.hidden_size,
        "intermediate_size": 3 * profile.hidden_size,
        "num_hidden_layers": profile.layers,
        "num_attention_heads": profile.hidden_size // 64,
        "num_key_value_heads": max(1, profile.hidden_size // 128),
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "pad_token_id": _ID["<pad>"],
        "bos_token_id": None,
        "eos_token_id": _ID["<end>"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [12, 10, 10]},
    }
    tower = {
        "depth": profile.tower_layers,
        "hidden_size": profile.tower_size,
        "intermediate_size": 4 * profile.tower_size,
        "num_heads": profile.tower_size // 64,
        "out_hidden_size": profile.hidden_size,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "deepstack_visual_indexes": list(range(profile.tower_layers)),
    }
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=tower,
        image_token_id=_ID["<|image_pad|>"],
        video_token_id=_ID["<|video_pad|>"],
        vision_start_token_id=_ID["<|vision_start|>"],
        vision_end_token_id=_ID["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    torch.manual_seed(SEED)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(folder)


class ImageProcessor(Qwen3VLProcessor):
    """Qwen3-VL's processor without the one for videos, which needs torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        """The parts that it is saved with."""
        return [name for name in super().get_attributes() if name != "video_processor"]


def processor_of(profile: VisionProfile) -> ImageProcessor:
    """The processor: a word for every token id, images of any size that divides into placeholders."""
    vocab = {SPECIAL[i] if i < len(SPECIAL) else f"w{i}": i for i in range(profile.vocab_size)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<pad>")
    images = Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=MERGE, min_pixels=1, max_pixels=2**22)
    return ImageProcessor(image_processor=images, tokenizer=tokenizer, chat_template=TEMPLATE)


def picture(number: int, height: int, width: int) -> Image.Image:
    """Smooth random colours, other ones for every number."""
    draw = np.random.default_rng((SEED, number))
    coarse = Image.fromarray(draw.integers(0, 256, (6, 9, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def write_pairs(file: Path, profile: VisionProfile, pairs: int, pairs_per_image: int) -> None:
    """Draw pairs of random words, JSON lines of image (its number), question, chosen, rejected.

    Pairs of one image follow on each other and ask other questions.
    """
    rng = np.random.default_rng(SEED)

    def words(lengths: tuple[int, int]) -> str:
        ids = rng.integers(len(SPECIAL), profile.vocab_size, rng.integers(lengths[0], lengths[1] + 1))
        return " ".join(f"w{token}" for token in ids)

    rows = [
        {
            "image": pair // pairs_per_image,
            "question": words(profile.question),
            "chosen": words(profile.response),
            "rejected": words(profile.response),
        }
        for pair in range(pairs)
    ]
    write_jsonl(file, rows)


@dataclass(frozen=True, kw_only=True)
class VisionCase(StepCase):
    """StepCase with images; pairs_file is of write_pairs.

    Attributes:
        profile: name in VISION_PROFILES.
    """

    profile: str

    @property
    def of(self) -> VisionProfile:
        """The profile."""
        return VISION_PROFILES[self.profile]

    def load_model(self) -> Any:
        """The model, float32."""
        return AutoModelForImageTextToText.from_pretrained(self.model, dtype=torch.float32)

    def load_processing(self) -> ImageProcessor:
        """Its processor."""
        return processor_of(self.of)

    def dataset(self) -> Any:
        """TRL's vision format: images, and a prompt that holds an image part before its text."""
        from datasets import Dataset

        return Dataset.from_list([conversation(row, self.of) for row in self.rows()])

    def watch(self, model: Any) -> "Watch":
        """Counts positions, calls of the vision tower and images."""
        return Watch(model, self.of)


def conversation(row: dict[str, Any], profile: VisionProfile) -> dict[str, Any]:
    """A row of write_pairs in TRL's vision format."""
    content = [{"type": "image", "text": None}, {"type": "text", "text": row["question"]}]
    return {
        "images": [picture(row["image"], *profile.pixels)],
        "prompt": [{"role": "user", "content": content}],
        **{side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")},
    }


class Watch:
    """Counts in `counts` what runs inside `with Watch(model, profile):`, of the model and of a reference.

    positions: tokens that a backbone's embedding looked up, pads included. tower_calls: calls of a vision tower.
    images: those that it saw, an equal one as often as it saw it.
    """

    def __init__(self, model: Any, profile: VisionProfile) -> None:
        """Count for models of this one's kind."""
        self.counts = {"positions": 0, "tower_calls": 0, "images": 0}
        self._vocab = profile.vocab_size
        self._tower = type(model.model.visual.patch_embed)
        rows, columns = profile.image_tokens
        self._patches = rows * columns * MERGE**2

    def __enter__(self) -> "Watch":
        """Begin."""
        self._hook = nn.modules.module.register_module_forward_pre_hook(self._ran)
        return self

    def _ran(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, self._tower):
            self.counts["tower_calls"] += 1
            self.counts["images"] += inputs[0].shape[0] // self._patches
        elif isinstance(module, nn.Embedding) and module.num_embeddings == self._vocab:
            self.counts["positions"] += inputs[0].numel()

    def __exit__(self, *error: Any) -> None:
        """Stop."""
        self._hook.remove()


def expected_counts(rows: Sequence[dict[str, Any]], profile: VisionProfile, pairs_per_step: int) -> dict[str, float]:
    """What a step of dpofast needs of one model, a mean over steps, in the form of Watch.counts; rows of write_pairs.

    A step's sequences share what they begin with alike, an image being one where it is the same; a last token is only a
    target. The tower runs once and sees an image once.
    """
    starts = range(0, len(rows), pairs_per_step)
    steps = [rows[start : start + pairs_per_step] for start in starts]
    positions = sum(unique_tokens([ids[:-1] for row in step for ids in sequences(row, profile)])[0] for step in steps)
    images = sum(len({row["image"] for row in step}) for step in steps)
    return {"positions": positions / len(steps), "tower_calls": 1, "images": images / len(steps)}


def sequences(row: dict[str, Any], profile: VisionProfile) -> list[np.ndarray]:
    """Token ids of prompt + chosen and prompt + rejected, where an image's placeholders are -1 - its number."""

    def ids(words: str) -> list[int]:
        return [int(word[1:]) for word in words.split()]

    image = [-1 - row["image"]] * math.prod(profile.image_tokens)
    prompt = [_ID["<user>"], _ID["<|vision_start|>"], *image, _ID["<|vision_end|>"], *ids(row["question"])]
    prompt.append(_ID["<assistant>"])
    return [np.array([*prompt, *ids(row[side]), _ID["<end>"]]) for side in ("chosen", "rejected")]
