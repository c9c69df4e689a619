"""Whole processors of composite families, made without files, that fit the tiny models of vision_models.py.

A token is a character in lower case. The processors are transformers' own classes; those that also want a video
processor, which needs torchvision, do without it.
"""

import numpy as np
import transformers
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.vision_models import END, IMAGE, START, VIDEO

CHARACTERS = "\n abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'\"()<>|-_/#="
FIRST = 3  # of the characters' ids, after <pad>, <s> and </s>
IMAGE_TOKEN = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), "<|image_pad|>"),
    **dict.fromkeys(("llava", "llava_next", "llava_onevision", "idefics3"), "<image>"),
    "glm4v": "<|image|>",
    "gemma3": "<image_soft_token>",
    "internvl": "<IMG_CONTEXT>",
}
_QWEN = {IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>", START: "<|vision_start|>", END: "<|vision_end|>"}
_SPECIAL = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), _QWEN),
    "glm4v": {IMAGE: "<|image|>", VIDEO: "<|video|>", START: "<|begin_of_image|>", END: "<|end_of_image|>"},
    **dict.fromkeys(("llava", "llava_next", "llava_onevision"), {IMAGE: "<image>", VIDEO: "<video>"}),
    "idefics3": {IMAGE: "<image>", 95: "<fake_token_around_image>", 96: "<end_of_utterance>"},
    "gemma3": {IMAGE: "<image_soft_token>", START: "<start_of_image>", END: "<end_of_image>"},
    "internvl": {IMAGE: "<IMG_CONTEXT>", VIDEO: "<video>", START: "<img>", END: "</img>"},
}
# Tokens that some processors read from their tokenizer
_NAMED = {
    "gemma3": {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
}
_TILE = {"height": 8, "width": 8}
_PINPOINTS = [[8, 16], [16, 8], [16, 16]]
_SIZES = {"patch_size": 4, "min_pixels": 64, "max_pixels": 1024}
# Family: processor, image processor, its settings, the processor's settings
_FAMILIES = {
    "qwen2_vl": ("Qwen2VL", "Qwen2VL", _SIZES, {}),
    "qwen2_5_vl": ("Qwen2_5_VL", "Qwen2VL", _SIZES, {}),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), ("Qwen3VL", "Qwen2VL", _SIZES, {})),
    "glm4v": ("Glm4v", "Glm4v", {"patch_size": 4, "size": {"shortest_edge": 128, "longest_edge": 1024}}, {}),
    "llava": (
        "Llava",
        "CLIP",
        {"size": {"shortest_edge": 8}, "crop_size": _TILE},
        {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "llava_next": (
        "LlavaNext",
        "LlavaNext",
        {"size": {"shortest_edge": 8}, "crop_size": _TILE, "image_grid_pinpoints": _PINPOINTS},
        {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "llava_onevision": (
        "LlavaOnevision",
        "LlavaOnevision",
        {"size": _TILE, "image_grid_pinpoints": _PINPOINTS},
        {"num_image_tokens": 4, "vision_feature_select_strategy": "full"},
    ),
    "idefics3": (
        "Idefics3",
        "Idefics3",
        {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}},
        {"image_seq_len": 4},
    ),
    "gemma3": ("Gemma3", "Gemma3", {"size": _TILE}, {"image_seq_length": 4}),
    "internvl": (
        "InternVL",
        "GotOcr2",
        {"size": {"height": 16, "width": 16}, "crop_to_patches": True, "max_patches": 3},
        {"image_seq_length": 4},
    ),
}
FAMILIES = tuple(_FAMILIES)
_PLACEHOLDER = {**IMAGE_TOKEN, "gemma3": "<start_of_image>"}  # in the text that a processor is given


def tokenizer_of(family):
    """The family's tokenizer: special tokens have the ids of the tiny models."""
    special = _SPECIAL[family]
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {each: FIRST + i for i, each in enumerate(CHARACTERS)}
    vocab |= {special.get(i, f"<unused{i}>"): i for i in range(len(vocab), 97)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="#"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in special.values()])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=_NAMED.get(family),
    )


def template_of(family):
    """A chat template that writes "user: ...\\n", images where their parts stand, and ends an answer with EOS."""
    image = _PLACEHOLDER[family]
    if family.startswith("qwen"):
        image = f"<|vision_start|>{image}<|vision_end|>"
    if family == "glm4v":
        image = f"<|begin_of_image|>{image}<|end_of_image|>"
    content = (
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
        "{% if p['type'] == 'image' %}" + image + "{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}"
    )
    return (
        "{% for m in messages %}{{ m['role'] }}: " + content + "{% if m['role'] == 'assistant' %}{{ eos_token }}"
        "{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )


def processor_of(family):
    """The family's whole processor."""
    name, image_name, image_settings, settings = _FAMILIES[family]
    found = (getattr(transformers, f"{image_name}ImageProcessor{kind}", None) for kind in ("Pil", ""))
    image_processor = next(cls for cls in found if cls is not None)(**image_settings)
    plain = getattr(transformers, f"{name}Processor")
    # kept where pickle finds it
    cls = globals().setdefault(
        f"{name}Processor", type(plain.__name__, (_WithoutVideo, plain), {"__module__": __name__})
    )
    parts = {"image_processor": image_processor, "tokenizer": tokenizer_of(family)}
    return cls(**parts, **settings, chat_template=template_of(family))


class _WithoutVideo:
    """A processor that has no video processor, since one needs torchvision."""

    @classmethod
    def get_attributes(cls):
        return [name for name in super().get_attributes() if name != "video_processor"]


def picture(seed, height, width):
    """A picture of random colours."""
    pixels = np.random.RandomState(seed).randint(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
