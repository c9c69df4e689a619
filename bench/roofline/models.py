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

    def active_weights(self) -> int:
        """Of these, those that compute a token: the experts that it does not choose left out."""
        idle = max(self.experts - self.experts_per_token, 0) * sum(i * o for i, o in self.mlp_linears())
        return self.weights() - self.layers * idle

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
    "qwen3-235b-a22b": (
        "Qwen/Qwen3-235B-A22B",
        ModelShape(
            layers=94,
            hidden=4096,
            intermediate=1536,
            heads=64,
            kv_heads=4,
            head_dim=128,
            vocab=151_936,
            experts=128,
            experts_per_token=8,
        ),
    ),
}


# The types of transformers whose layers are those that ModelShape counts: q, k, v and o, where a query sees all keys
# before it; gate, up and down, of a layer or of each of its experts, none of them shared; two norms.
MODEL_TYPES = tuple("gemma llama mistral mixtral olmo2 qwen2 qwen3 qwen3_moe smollm3".split())
# What a config must say itself; the rest has the defaults of its type.
_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


def find_model(name: str) -> ModelShape:
    """The shape of a model of MODELS, or of a config.json or the folder that holds one.

    Raises:
        ValueError: neither; or, with the file's name, no JSON object, or a config that from_config refuses.
    """
    if name.lower() in MODELS:
        return MODELS[name.lower()][1]
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"--model: expected one of {', '.join(MODELS)} or the path of a config.json, got {name!r}")
    try:
        return from_config(_read(path))
    except ValueError as error:
        raise ValueError(f"--model {path}: {error}") from error


def _read(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"expected the JSON of a transformers config, got none ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"expected the JSON object of a transformers config, got a {type(config).__name__}")
    return config


def from_config(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a transformers config describes; what it leaves out is as its type has it by default.

    Args:
        config: the values of a config.json, or of `config.to_dict()`.

    Raises:
        ValueError: a model type that is not counted, a missing size, what transformers refuses, a sliding window, or
            layers that are not all alike.
    """
    # Here, as it takes seconds and names of MODELS need none of it.
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    if (kind := config.get("model_type")) not in MODEL_TYPES:
        raise ValueError(f"expected a model_type whose layers are counted, {', '.join(MODEL_TYPES)}, got {kind!r}")
    if missing := [key for key in _SIZES if not config.get(key)]:
        raise ValueError(f"expected a config of a causal language model, got one without {', '.join(missing)}")
    try:
        whole = CONFIG_MAPPING[kind].from_dict(dict(config))
    except StrictDataclassError as error:
        raise ValueError(f"expected a config that transformers takes for {kind}, got: {error}") from error
    if window := getattr(whole, "sliding_window", None):
        raise ValueError(
            f"expected attention to all keys, got sliding_window {window}, which is not counted: "
            "make it null where no sequence is longer"
        )
    if getattr(whole, "mlp_only_layers", None) or getattr(whole, "decoder_sparse_step", 1) != 1:
        raise ValueError("expected layers that are all alike, got mlp_only_layers or a decoder_sparse_step above 1")
    heads, experts = whole.num_attention_heads, getattr(whole, "num_experts", 0)
    return ModelShape(
        layers=whole.num_hidden_layers,
        hidden=whole.hidden_size,
        intermediate=getattr(whole, "moe_intermediate_size", None) or whole.intermediate_size,
        heads=heads,
        kv_heads=whole.num_key_value_heads or heads,
        head_dim=getattr(whole, "head_dim", None) or whole.hidden_size // heads,
        vocab=whole.vocab_size,
        tied=whole.tie_word_embeddings,
        experts=experts,
        experts_per_token=whole.num_experts_per_tok if experts else 0,
    )
