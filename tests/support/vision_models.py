"""Tiny random vision-language models of every family that takes images, and what their processors make of images.

The processors' outputs are made by hand: pixels are normal numbers, and the placeholders of an image are counted as the
family's processor counts them.
"""

import torch
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.support.tiny import VOCAB

IMAGE, VIDEO, START, END, BREAK = 90, 91, 92, 93, 94
_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 2, "image_size": 8, "patch_size": 4, "projection_dim": 16,
}  # fmt: skip
_SIGLIP = {**_CLIP, "model_type": "siglip_vision_model"}
_PIXTRAL = {
    "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "head_dim": 8, "image_size": 64, "patch_size": 4,
}  # fmt: skip
_QWEN_VISION = {
    "depth": 2, "num_heads": 2, "in_channels": 3, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2,
    "intermediate_size": 24,
}  # fmt: skip
_IDEFICS = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip


def _rope(*sections, **more):
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections), **more}
    return {"rope_parameters": rope}


_DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, **_rope(1, 1, 0, partial_rotary_factor=0.5),
}  # fmt: skip
_QWEN3_VISION = {
    **_QWEN_VISION, "hidden_size": 16, "out_hidden_size": 32, "deepstack_visual_indexes": [0],
    "num_position_embeddings": 64,
}  # fmt: skip
_QWEN35_VISION = {key: value for key, value in _QWEN3_VISION.items() if key != "deepstack_visual_indexes"}
_GLM_VISION = {**_QWEN_VISION, "hidden_size": 16, "out_hidden_size": 32, "image_size": 32}
_GLM_ROPE = _rope(1, 1, 0, partial_rotary_factor=0.5)
_PINPOINTS = {"image_grid_pinpoints": [[8, 16], [16, 8], [16, 16]]}
# Name: (model type, options of the text part, options of the vision part, options of the whole)
FAMILIES = {
    "qwen2_vl": ("qwen2_vl", _rope(1, 1, 2), {**_QWEN_VISION, "embed_dim": 16, "hidden_size": 32}, {}),
    "qwen2_5_vl": (
        "qwen2_5_vl", _rope(1, 1, 2),
        {**_QWEN_VISION, "hidden_size": 16, "out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 16}, {},
    ),
    "qwen3_vl": ("qwen3_vl", _rope(2, 1, 1), _QWEN3_VISION, {}),
    "qwen3_vl_moe": ("qwen3_vl_moe", {**_rope(2, 1, 1), **_EXPERTS}, _QWEN3_VISION, {}),
    "qwen3_5": ("qwen3_5", _DELTA_NET, _QWEN35_VISION, {}),
    "qwen3_5_moe": (
        "qwen3_5_moe", {**_DELTA_NET, **_EXPERTS, "shared_expert_intermediate_size": 16}, _QWEN35_VISION, {},
    ),
    "glm4v": ("glm4v", _GLM_ROPE, _GLM_VISION, {}),
    "glm4v_moe": (
        "glm4v_moe",
        {**_GLM_ROPE, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1,
         "topk_group": 1, "first_k_dense_replace": 1},
        _GLM_VISION, {},
    ),
    "glm46v": ("glm46v", {"model_type": "glm4v_text", **_GLM_ROPE}, {"model_type": "glm4v_vision", **_GLM_VISION}, {}),
    "llava": ("llava", {"model_type": "llama"}, _CLIP, {}),
    "llava_siglip": ("llava", {"model_type": "llama"}, _SIGLIP, {"vision_feature_select_strategy": "full"}),
    "pixtral": (
        "llava", {"model_type": "mistral", "sliding_window": None}, _PIXTRAL,
        {"vision_feature_select_strategy": "full", "vision_feature_layer": -1},
    ),
    "llava_next": ("llava_next", {"model_type": "llama"}, _CLIP, _PINPOINTS),
    "llava_onevision": (
        "llava_onevision", {"model_type": "qwen2"}, _SIGLIP,
        {"vision_feature_select_strategy": "full", "vision_feature_layer": -1, **_PINPOINTS},
    ),
    "idefics3": ("idefics3", {"model_type": "llama"}, _IDEFICS, {}),
    "smolvlm": ("smolvlm", {"model_type": "llama"}, _IDEFICS, {}),
    "internvl": (
        "internvl", {"model_type": "qwen2"},
        {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
         "image_size": [16, 16], "patch_size": [4, 4]}, {},
    ),
    "mistral3": ("mistral3", {"model_type": "mistral", "sliding_window": None}, _PIXTRAL, {}),
    "lfm2_vl": (
        "lfm2_vl",
        {"model_type": "lfm2", "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False,
         "initializer_range": 0.2},
        {"model_type": "siglip2_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "patch_size": 4, "num_patches": 16}, {"projector_hidden_size": 24},
    ),
    "gemma3": (
        "gemma3", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}, _SIGLIP,
        {"mm_tokens_per_image": 4},
    ),
}  # fmt: skip
PACKED = tuple(name for name in FAMILIES if name != "gemma3")


def vision_model(name):
    """A float32 model of the family in eval mode, the same at every call."""
    kind, text, vision, whole = FAMILIES[name]
    tokens = {
        "image_token_id": IMAGE, "image_token_index": IMAGE, "video_token_id": VIDEO, "video_token_index": VIDEO,
        "vision_start_token_id": START, "vision_end_token_id": END, "image_start_token_id": START,
        "image_end_token_id": END, "tie_word_embeddings": False,
    }  # fmt: skip
    known = CONFIG_MAPPING[kind]().to_dict()
    options = {key: value for key, value in tokens.items() if key in known}
    for alias in ("image_token", "video_token"):
        if f"{alias}_id" in options:
            options.pop(f"{alias}_index", None)
    config = CONFIG_MAPPING[kind](text_config={**_TEXT, **text}, vision_config=vision, **options, **whole)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # weights that no initialization fills (image_newline), and those that it sets to 0 (Gemma 3's projector)
            if not 0 < float(parameter.abs().max()) < 1e3 and (parameter.ndim > 1 or not (parameter == 0).all()):
                parameter.normal_(0, 0.02)
        if name != "lfm2_vl":
            model.get_output_embeddings().weight.mul_(10.0)  # log-probs that are far apart
    return model
