"""Tiny configs of every causal family: a shrinker over the names that configs use, and overrides where it fails."""

from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig


def _sizes(**names_of_size: str) -> dict[str, int]:
    """{name: size} of options like n32="hidden_size d_model"."""
    return {name: int(size[1:]) for size, names in names_of_size.items() for name in names.split()}


# Sizes by the names that families use. A name that a config lacks is left out.
SIZES: dict[str, Any] = {
    **_sizes(
        n97="vocab_size vocab_size_per_layer_input",
        n64="max_position_embeddings n_positions max_seq_len n_ctx max_sequence_length max_target_positions",
        n48="intermediate_size intermediate_size_mlp ffn_dim d_ff dim_ff n_inner dff d_inner ffn_hidden_size "
        "decoder_ffn_dim encoder_ffn_dim",
        n32="hidden_size d_model n_embd word_embed_proj_dim embedding_size dim_model emb_dim hidden_size_global "
        "input_embedding_size output_embedding_size attention_hidden_size lru_width",
        n16="moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size "
        "shared_intermediate_size expert_ffn_hidden_size",
        n8="head_dim d_kv kv_channels global_head_dim attention_head_dim v_head_dim qk_rope_head_dim qk_nope_head_dim "
        "q_lora_rank kv_lora_rank sliding_window attention_chunk_size local_attention hidden_size_per_layer_input",
        n4="num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
        "num_decoder_attention_heads num_encoder_attention_heads num_local_experts num_experts n_routed_experts "
        "moe_num_experts",
        n2="num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
        "num_encoder_layers num_key_value_heads num_key_value_groups num_kv_heads num_experts_per_tok moe_k moe_topk "
        "moe_top_k eos_token_id",
        n1="n_shared_experts n_group topk_group first_k_dense_replace bos_token_id decoder_start_token_id",
        n0="pad_token_id",
    ),
    "is_decoder": True,
}
# Left out where the family's default is None, which turns something off or follows from other sizes.
_NONE_SAYS_SOMETHING = {"sliding_window", "q_lora_rank", "head_dim", "n_inner", "num_key_value_heads"}
# Over SIZES, by model type.
_LEFT_OUT = object()  # the family's own default
_MLA = {"num_key_value_heads": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "head_dim": _LEFT_OUT}
_MAMBA = {
    "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8,
    "mamba_expand": 2,
}  # fmt: skip
_OWN_ATTENTION = {"attention_hidden_size": _LEFT_OUT, "attention_head_dim": _LEFT_OUT}
_LAYERS = ("sliding_attention", "full_attention")
_GEMMA4_DRAFT = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 2, "layer_types": list(_LAYERS),
}  # fmt: skip
OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32"), _MLA),
    **dict.fromkeys(("dots3_note", "dots3_note_text", "glm4_moe_lite", "glm_moe_dsa"), _MLA),
    "kimi_linear": {**_MLA, "linear_head_dim": 8, "linear_num_heads": 2},
    **dict.fromkeys(("minicpm3", "youtu"), _MLA),
    "longcat_flash": {**_MLA, "head_dim": 4},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"]},
    "falcon_h1": {**_MAMBA, "mamba_d_head": 8},
    **dict.fromkeys(("codegen", "gptj"), {"rotary_dim": 4}),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), {"head_dim": 8}),
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8},
    **dict.fromkeys(("lfm2", "lfm2_moe"), {"layer_types": ["conv", "full_attention"]}),
    "reformer": {
        "axial_pos_embds": False, "attention_head_size": 8, "feed_forward_size": 48, "attn_layers": ["local", "lsh"],
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gemma3n_text": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97},
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2, "ngram_vocab_size_base": 100, "hc_lowrank": 8,
    }),
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {
        **_OWN_ATTENTION, "num_hidden_layers": 6,
        "layer_types": ["mamba", "mamba", "hybrid", "mamba", "mamba", "hybrid"],
    },
    "zamba2": {
        **_OWN_ATTENTION, "num_hidden_layers": 4, "layer_types": ["mamba", "hybrid", "mamba", "hybrid"],
        "hybrid_layer_ids": [1, 3],
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": dict.fromkeys(_LAYERS, {"rope_type": "default", "rope_theta": 1e4}),
    },
    "diffllama": {"attention_dropout": 0.0},
    # read from the config while the layers run, so a rate above 0 is refused by name
    "falcon": {"hidden_dropout": 0.0, "attention_dropout": 0.0},
    "persimmon": {"attention_dropout": 0.0},
}  # fmt: skip
# Whole configs of types whose own defaults are refused by their class.
WHOLE: dict[str, dict[str, Any]] = dict.fromkeys(
    ("gemma4_assistant", "gemma4_unified_assistant"), {"text_config": _GEMMA4_DRAFT}
)


def tiny_config(name: str, config_class: Any) -> PretrainedConfig:
    """A tiny config of the model type, of the class that its causal model takes."""
    if name in WHOLE:
        return CONFIG_MAPPING[name](**WHOLE[name])
    whole = CONFIG_MAPPING[name]()
    if not isinstance(whole, config_class):
        parts = [getattr(whole, part) for part in whole.sub_configs]
        whole = next((part for part in parts if isinstance(part, config_class)), whole)
    options = _shrunk(whole)
    options.update(OVERRIDES.get(name, {}))
    options = {option: value for option, value in options.items() if value is not _LEFT_OUT}
    return type(whole)(**options)


def _shrunk(config: PretrainedConfig) -> dict[str, Any]:
    """The options of a config over its defaults that make it tiny, those of its sub-configs included."""
    options = {}
    defaults = config.to_dict()
    for name in {*defaults, *config.attribute_map} & SIZES.keys():
        if defaults.get(name) is not None or name not in _NONE_SAYS_SOMETHING:
            options[name] = SIZES[name]
    for mapped, own in config.attribute_map.items():
        if mapped in options and own in options and mapped != own:
            del options[mapped]
    # dropout is on where the family has it, so that train mode shows whether it can be turned off
    rates = (n for n, v in defaults.items() if ("drop" in n or "pdrop" in n) and "classifier" not in n)
    if not config.model_type.startswith("blt"):  # its layers read the rate from the config, which is refused by name
        options.update({n: 0.1 for n in rates if isinstance(defaults[n], float) and "layer" not in n})
    layers = next((options[n] for n in ("num_hidden_layers", "n_layer") if n in options), 2)
    kinds = defaults.get("layer_types")
    if kinds:
        distinct = list(dict.fromkeys(kinds))
        options["layer_types"] = (distinct * layers)[: max(layers, len(distinct))]
        options["num_hidden_layers"] = len(options["layer_types"])
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig):
            options[name] = _shrunk(part)
    return options
