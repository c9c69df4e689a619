"""The shape of a causal language model: what its products and its memory depend on."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder of the Llama kind. Biases and the norms of queries and keys are left out of all counts.

    Attributes:
        layers, hidden, intermediate, heads, kv_heads, head_dim, vocab: sizes; intermediate is an expert's where there
            are experts.
        tied: the LM head is the embedding.
        experts: of a layer's mixture, 0 for a dense MLP.
        experts_per_token: those that compute a token.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    experts: int = 0
    experts_per_token: int = 0

    @property
    def queries(self) -> int:
        """Width of all queries, heads * head_dim."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all keys, kv_heads * head_dim."""
        return self.kv_heads * self.head_dim

    def attention_linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of a layer's projections q, k, v and o."""
        return [
            (self.hidden, self.queries),
            (self.hidden, self.keys),
            (self.hidden, self.keys),
            (self.queries, self.hidden),
        ]

    def mlp_linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of gate, up and down, of one expert where there are experts."""
        return [(self.hidden, self.intermediate), (self.hidden, self.intermediate), (self.intermediate, self.hidden)]

    def layer_weights(self) -> int:
        """Weights of a layer's linear layers: all experts and their router."""
        attention, mlp = (sum(i * o for i, o in linears) for linears in (self.attention_linears(), self.mlp_linears()))
        return attention + mlp * max(self.experts, 1) + self.hidden * self.experts

    def weights(self) -> int:
        """Weights of the whole model."""
        norms = self.hidden * (2 * self.layers + 1)
        return self.layers * self.layer_weights() + norms + self.hidden * self.vocab * (1 if self.tied else 2)

    def lora_weights(self, rank: int) -> int:
        """Weights of an adapter of this rank on every linear layer but the head and routers."""
        linears = self.attention_linears() + self.mlp_linears() * max(self.experts, 1)
        return self.layers * rank * sum(i + o for i, o in linears)


# From each model's public config.json, by its name on the Hugging Face hub.
MODELS = {
    "smollm2-135m": (
        "HuggingFaceTB/SmolLM2-135M",
        ModelShape(layers=30, hidden=576, intermediate=1536, heads=9, kv_heads=3, head_dim=64, vocab=49_152, tied=True),
    ),
    "qwen2.5-0.5b": (
        "Qwen/Qwen2.5-0.5B",
        ModelShape(
            layers=24, hidden=896, intermediate=4864, heads=14, kv_heads=2, head_dim=64, vocab=151_936, tied=True
        ),
    ),
    "qwen2.5-7b": (
        "Qwen/Qwen2.5-7B",
        ModelShape(layers=28, hidden=3584, intermediate=18_944, heads=28, kv_heads=4, head_dim=128, vocab=152_064),
    ),
    "olmo-2-7b": (
        "allenai/OLMo-2-1124-7B",
        ModelShape(layers=32, hidden=4096, intermediate=11_008, heads=32, kv_heads=32, head_dim=128, vocab=100_352),
    ),
    "llama-3.1-8b": (
        "meta-llama/Llama-3.1-8B",
        ModelShape(layers=32, hidden=4096, intermediate=14_336, heads=32, kv_heads=8, head_dim=128, vocab=128_256),
    ),
    "llama-3.1-70b": (
        "meta-llama/Llama-3.1-70B",
        ModelShape(layers=80, hidden=8192, intermediate=28_672, heads=64, kv_heads=8, head_dim=128, vocab=128_256),
    ),
    "mixtral-8x7b": (
        "mistralai/Mixtral-8x7B-v0.1",
        ModelShape(
            layers=32,
            hidden=4096,
            intermediate=14_336,
            heads=32,
            kv_heads=8,
            head_dim=128,
            vocab=32_000,
            experts=8,
            experts_per_token=2,
        ),
    ),
}


def find_model(name: str) -> ModelShape:
    """The shape of a model of MODELS, or of a config.json or the folder that holds one.

    Raises:
        ValueError: neither, or a config without the sizes of a decoder of the Llama kind.
    """
    if name.lower() in MODELS:
        return MODELS[name.lower()][1]
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"--model: expected one of {', '.join(MODELS)} or the path of a config.json, got {name!r}")
    return from_config(json.loads(path.read_text(encoding="utf-8")))


def from_config(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a transformers config describes.

    Args:
        config: the values of a config.json, or of `config.to_dict()`.

    Raises:
        ValueError: a size is missing, or the layers are not all alike.
    """
    config = config.get("text_config") or config
    wanted = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    if missing := [key for key in wanted if not config.get(key)]:
        raise ValueError(f"expected a config of a causal language model, got one without {', '.join(missing)}")
    experts = config.get("num_local_experts") or config.get("num_experts") or config.get("n_routed_experts") or 0
    mixed = ("first_k_dense_replace", "n_shared_experts", "shared_expert_intermediate_size", "mlp_only_layers")
    if experts and (found := [key for key in mixed if config.get(key)]):
        raise ValueError(f"expected layers that are all alike, with routed experts only, got {', '.join(found)}")
    intermediate = (config.get("moe_intermediate_size") if experts else None) or config.get("intermediate_size")
    if not intermediate:
        raise ValueError("expected a config with intermediate_size, got one without")
    heads = config["num_attention_heads"]
    return ModelShape(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        intermediate=intermediate,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        experts=experts,
        experts_per_token=config.get("num_experts_per_tok", 0) if experts else 0,
    )
