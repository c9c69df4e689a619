"""Tiny composite models of transformers: a language model beside an encoder of images, with random weights."""

import torch
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.support.tiny import VOCAB

# The place of an image, in no text of tiny_pairs.
MEDIA_ID = 0
_SIZES = {
    "hidden_size": 32,
    "embed_dim": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "depth": 2,
    "num_attention_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "out_hidden_size": 32,
    "image_size": 28,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "layer_types": ["full_attention"] * 2,
}
# What the sizes above do not fit, by part of the config.
_OTHERS = {
    "gemma3": {"text_config": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}},
    "gemma4": {
        "text_config": {
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 4,
            "global_head_dim": 8,
            "num_global_key_value_heads": 2,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
        },
        "vision_config": {"global_head_dim": 8, "position_embedding_size": 16, "default_output_length": 4},
    },
    "qwen2_vl": {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
    },
    "qwen2_5_vl": {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
        "vision_config": {"fullatt_block_indexes": [1]},
    },
    "qwen3_vl": {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
        "vision_config": {"deepstack_visual_indexes": [0]},
    },
    "llava": {"text_config": {"model_type": "llama"}},
    "mistral3": {"text_config": {"model_type": "mistral", "sliding_window": None}},
    "internvl": {"text_config": {"model_type": "qwen2"}},
    "glm4v": {
        "text_config": {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [1, 1, 0],
                "partial_rotary_factor": 0.5,
            }
        },
    },
    "smolvlm": {"text_config": {"model_type": "llama"}},
}
COMPOSITES = tuple(_OTHERS)


def tiny_composite(family, dtype=torch.float32):
    """A model of the family with the same weights in every call."""
    config = CONFIG_MAPPING[family]().to_dict()
    parts = {}
    for part, values in config.items():
        if not part.endswith("_config") or not isinstance(values, dict):
            continue
        others = _OTHERS[family].get(part, {})
        if "model_type" in others:
            values = CONFIG_MAPPING[others["model_type"]]().to_dict()
        sizes = {name: value for name, value in _SIZES.items() if name in values}
        values.pop("per_layer_config", None)  # of layers that are not there
        parts[part] = {**values, **sizes, **others}
    for name in config:
        if name.endswith(("token_id", "token_index")):
            config[name] = MEDIA_ID
    config = CONFIG_MAPPING[family].from_dict({**config, **parts})
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config).to(dtype)
