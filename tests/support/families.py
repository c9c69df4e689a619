"""Tiny random models of many families: those that run packed, and those that are refused and run with padded rows."""

import torch
import transformers

from tests.support.tiny import SHAPE, VOCAB

_GPT_SHAPE = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4}
_HIDDEN = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2}
_SHAPE = {**SHAPE, "num_hidden_layers": 2, "intermediate_size": 48}
_ALTERNATING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts_per_tok": 2}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_DECODER = {
    "vocab_size": VOCAB, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
    "dropout": 0.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}  # fmt: skip
_NARROW = {"head_dim": 8}  # where the family's default does not follow from hidden_size
_LATENT = {
    **_EXPERTS, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "moe_intermediate_size": 16,
}  # fmt: skip
_INDEXED = {**_LATENT, "index_topk": 32, "index_head_dim": 8, "index_n_heads": 2}

# Family: (what its classes are called, options over _SHAPE, or a whole shape where it has vocab_size)
PACKED = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", _NARROW),
    "mistral": ("Mistral", {"sliding_window": 4}),
    "mixtral": ("Mixtral", {**_EXPERTS, "num_local_experts": 4}),
    "qwen3-moe": ("Qwen3Moe", {**_NARROW, **_EXPERTS, "num_experts": 4, "moe_intermediate_size": 16}),
    "gemma2": (
        "Gemma2",
        {**_NARROW, "sliding_window": 4, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0,
         "final_logit_softcapping": 3.0},
    ),
    "gemma3": ("Gemma3", {**_NARROW, **_ALTERNATING, "query_pre_attn_scalar": 8}),
    "gemma4": ("Gemma4", {**_NARROW, **_ALTERNATING, "global_head_dim": 8}),
    "phi3": ("Phi3", {"pad_token_id": 0}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", _ALTERNATING),
    "smollm3": ("SmolLM3", {"pad_token_id": 0}),
    "granite": ("Granite", {"logits_scaling": 4.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5}),
    "cohere": ("Cohere", {"logit_scale": 0.5}),
    "cohere2": ("Cohere2", {**_ALTERNATING, "logit_scale": 0.5}),
    "gpt2": ("GPT2", {**_GPT_SHAPE, "n_positions": 64}),
    "gpt-neox": ("GPTNeoX", {}),
    "gpt-oss": ("GptOss", {**_NARROW, **_ALTERNATING, **_EXPERTS, "num_local_experts": 4}),
    "deepseek-v3": ("DeepseekV3", {**_LATENT, "v_head_dim": 6}),
    "deepseek-v3.2": ("DeepseekV32", _INDEXED),
    "glm-moe-dsa": ("GlmMoeDsa", {**_INDEXED, "indexer_types": ["full", "shared"]}),
    "starcoder2": ("Starcoder2", {"sliding_window": 4}),
    "exaone4": ("Exaone4", _ALTERNATING),
    "opt": (
        "OPT",
        {**_HIDDEN, "ffn_dim": 48, "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    ),
    "gpt-j": ("GPTJ", {**_GPT_SHAPE, "n_positions": 64, "rotary_dim": 4}),
    "codegen": ("CodeGen", {**_GPT_SHAPE, "n_positions": 64, "rotary_dim": 4}),
    "gpt-neo": (
        "GPTNeo",
        {**_HIDDEN, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64, "window_size": 4,
         "attention_types": [[["global", "local"], 1]]},
    ),
    "gpt-neox-japanese": ("GPTNeoXJapanese", {"hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "nemotron": ("Nemotron", {}),
    "stablelm": ("StableLm", {}),
    "stablelm-parallel": ("StableLm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "biogpt": ("BioGpt", {"max_position_embeddings": 64, **_NO_DROPOUT}),
    "whisper": ("Whisper", {**_DECODER, "encoder_layers": 1, "max_target_positions": 64}),
    "bart": ("Bart", {**_DECODER, "max_position_embeddings": 64}),
    "marian": ("Marian", {**_DECODER, "max_position_embeddings": 64, "decoder_vocab_size": VOCAB}),
    "diffllama": ("DiffLlama", {}),
    "llama4": (
        "Llama4",
        {**_NARROW, "num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 4,
         "interleave_moe_layer_step": 2, "layer_types": ["chunked_attention", "full_attention"],
         "no_rope_layers": [1, 0], "floor_scale": 3, "attn_scale": 0.5},
    ),
    # Classes of hybrids, without a layer that carries a state
    "granitemoehybrid-attention": (
        "GraniteMoeHybrid",
        {"layer_types": ["full_attention"] * 2, "shared_intermediate_size": 48, "mamba_n_heads": 4, **_EXPERTS,
         "num_local_experts": 4},
    ),
    "qwen3-next-attention": (
        "Qwen3Next",
        {**_NARROW, **_EXPERTS, "layer_types": ["full_attention"] * 2, "num_experts": 4, "moe_intermediate_size": 16,
         "shared_expert_intermediate_size": 16},
    ),
    "nemotron-h-attention": (
        "NemotronH", {**_NARROW, "layer_types": ["full_attention", "mlp"]},
    ),
}  # fmt: skip
_MAMBA = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_d_conv": 3,
    "mamba_chunk_size": 8,
}  # fmt: skip
_DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
_LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6,
    "pad_token_id": 0, "moe_intermediate_size": 16, "num_local_experts": 4, "n_group": 1, "topk_group": 1,
}  # fmt: skip
# Hybrids: families with recurrent layers, alone, between layers of attention or inside them, in the form of PACKED.
HYBRIDS = {
    "qwen3.5": ("Qwen3_5", {**_NARROW, **_DELTA_NET}),
    "qwen3.5-moe": (
        "Qwen3_5Moe",
        {**_NARROW, **_DELTA_NET, **_EXPERTS, "num_experts": 4, "moe_intermediate_size": 16,
         "shared_expert_intermediate_size": 16},
    ),
    "qwen3-next": (
        "Qwen3Next",
        {**_NARROW, **_DELTA_NET, **_EXPERTS, "num_experts": 4, "moe_intermediate_size": 16,
         "shared_expert_intermediate_size": 16},
    ),
    "olmo-hybrid": ("OlmoHybrid", {**_DELTA_NET, "pad_token_id": 0}),
    "kimi-linear": (
        "KimiLinear",
        {**_LATENT, **_EXPERTS, "layer_types": ["linear_attention", "full_attention"], "linear_head_dim": 8,
         "linear_num_heads": 2},
    ),
    "bailing-hybrid": (
        "BailingHybrid",
        {**_LATENT, **_EXPERTS, "layer_types": ["linear_attention", "full_attention"], "head_dim": 8,
         "first_k_dense_replace": 1},
    ),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"], "pad_token_id": 0, "initializer_range": 0.2}),
    "lfm2-moe": (
        "Lfm2Moe",
        {**_EXPERTS, "layer_types": ["conv", "full_attention"], "pad_token_id": 0, "num_experts": 4,
         "initializer_range": 0.2, "moe_intermediate_size": 16, "num_dense_layers": 1},
    ),
    "lfm3": (
        "Lfm3",
        {**_NARROW, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "sliding_attention"],
         "sliding_window": 4, "pad_token_id": 0},
    ),
    "mamba2": (
        "Mamba2",
        {**_HIDDEN, "num_heads": 4, "head_dim": 16, "n_groups": 2, "state_size": 8, "chunk_size": 8, "conv_kernel": 3},
    ),
    "nemotron-h": (
        "NemotronH",
        {**_NARROW, **_EXPERTS, "num_hidden_layers": 4,
         "layers_block_type": ["mamba", "moe", "attention", "mlp"], "ssm_state_size": 8, "mamba_num_heads": 4,
         "mamba_head_dim": 16, "n_groups": 2, "chunk_size": 8, "n_routed_experts": 4, "moe_intermediate_size": 16,
         "moe_shared_expert_intermediate_size": 16},
    ),
    "bamba": ("Bamba", {**_MAMBA, "attn_layer_indices": [1]}),
    "granite-hybrid": (
        "GraniteMoeHybrid",
        {**_MAMBA, **_EXPERTS, "layer_types": ["mamba", "attention"], "num_local_experts": 4,
         "shared_intermediate_size": 16, "logits_scaling": 4.0},
    ),
    "falcon-h1": (
        "FalconH1", {**_MAMBA, "mamba_d_ssm": 32, "mamba_d_head": 8, "lm_head_multiplier": 0.5},
    ),
    "zamba2": (
        "Zamba2",
        {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "n_mamba_heads": 4,
         "mamba_d_state": 8, "mamba_ngroups": 2, "chunk_size": 8, "num_mem_blocks": 2,
         "num_key_value_heads": 4, "use_shared_attention_adapter": True, "adapter_rank": 4, "use_mem_rope": True},
    ),
}  # fmt: skip
# LFM3 came after transformers 5.20, the last one for Python 3.10.
HYBRIDS = {name: made for name, made in HYBRIDS.items() if hasattr(transformers, f"{made[0]}ForCausalLM")}
PACKED |= HYBRIDS
_INTERFACE = "its attention does not go through transformers' AttentionInterface"
_STATE = "it carries a state from token to token"
# Family: (what its classes are called, options, why it cannot run packed)
REFUSED = {
    "bloom": ("Bloom", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}, _INTERFACE),
    "mpt": ("Mpt", {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}, _INTERFACE),
    "falcon": ("Falcon", {}, _INTERFACE),
    "falcon-alibi": ("Falcon", {"alibi": True}, _INTERFACE),
    "mamba": ("Mamba", _HIDDEN, _STATE),
    "rwkv": ("Rwkv", {**_HIDDEN, "attention_hidden_size": 32}, _STATE),
    "minimax": (
        "MiniMax",
        {**_EXPERTS, "num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"]},
        _STATE,
    ),
    "jamba": ("Jamba", {"num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8}, _STATE),
    "git": ("Git", {"vision_config": {"image_size": 8, "patch_size": 4}}, "0 of its 2 attention calls saw the packed"),
}  # fmt: skip


def family_model(name, **extra):
    """A random float32 model of a family, without dropout, the same at every call; extra are options of its config."""
    classes, options = (PACKED.get(name) or REFUSED[name])[:2]
    if "vocab_size" not in options:
        options = {**_SHAPE, **options}
    options = {**options, **extra}
    config_class = getattr(transformers, f"{classes}TextConfig", None) or getattr(transformers, f"{classes}Config")
    model_class = getattr(transformers, f"{classes}ForCausalLM", None) or getattr(transformers, f"{classes}LMHeadModel")
    torch.manual_seed(0)
    return model_class(config_class(**options)).eval()
