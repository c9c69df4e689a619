"""The ways to divide a model, and the models and pairs that they are counted on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.cases import SEED

FIRST_WORD = 3


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A small random Llama in float32 and its pairs.

    Attributes:
        title: for tables.
        hidden, intermediate, layers, heads, kv_heads, vocab: the model's sizes.
        prompt, response: least and most tokens of each part.
        pairs, steps: pairs of a step, over all ranks, and steps of a run.
        modes: the names of those modes that are counted on it.
    """

    title: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    prompt: tuple[int, int]
    response: tuple[int, int]
    pairs: int
    steps: int
    modes: tuple[str, ...]

    def config(self) -> dict[str, int]:
        """A LlamaConfig's values."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
        }

    def rows(self) -> list[dict[str, list[int]]]:
        """Random token ids of all steps' pairs."""
        draw = np.random.default_rng(SEED)

        def ids(least: int, most: int) -> list[int]:
            return draw.integers(FIRST_WORD, self.vocab, draw.integers(least, most + 1)).tolist()

        parts = {"prompt_ids": self.prompt, "chosen_ids": self.response, "rejected_ids": self.response}
        return [{name: ids(*lengths) for name, lengths in parts.items()} for _ in range(self.pairs * self.steps)]


@dataclass(frozen=True, kw_only=True)
class Mode:
    """One way to divide a model.

    Attributes:
        title: for tables.
        world: how many ranks.
        options: of DPOConfig.
        lora: rank of an adapter on all linear layers, 0 to train all weights.
    """

    title: str
    world: int
    options: Mapping[str, Any] = field(default_factory=dict)
    lora: int = 0

    @property
    def sharing(self) -> int:
        """How many ranks have the same pairs."""
        return self.options.get("tensor_parallel_size", 1) * self.options.get("sequence_parallel_size", 1)


_FSDP = {"fsdp": True, "fsdp_config": {"version": 2}}
_RECOMPUTED = {"gradient_checkpointing": True}
_OFFLOADED = {**_RECOMPUTED, "activation_offloading": True}


def _rows(ranks: int) -> dict[str, Any]:
    return {"sequence_parallel_size": ranks}


def _layers(ranks: int) -> dict[str, Any]:
    return {"tensor_parallel_size": ranks}


# The first of each kind is one process, whose losses the others must have.
MODES = {
    "one": Mode(title="one process", world=1),
    "one-recomputed": Mode(title="one process, recomputed", world=1, options=_RECOMPUTED),
    "one-lora": Mode(title="one process, LoRA", world=1, lora=4),
    "ddp2": Mode(title="DDP", world=2),
    "fsdp2": Mode(title="FSDP2", world=2, options=_FSDP),
    "fsdp4": Mode(title="FSDP2", world=4, options=_FSDP),
    "fsdp2-recomputed": Mode(title="FSDP2, recomputed", world=2, options={**_FSDP, **_RECOMPUTED}),
    "fsdp2-offloaded": Mode(title="FSDP2, offloaded", world=2, options={**_FSDP, **_OFFLOADED}),
    "sp2": Mode(title="SP 2", world=2, options=_rows(2)),
    "sp4": Mode(title="SP 4", world=4, options=_rows(4)),
    "sp4-recomputed": Mode(title="SP 4, recomputed", world=4, options={**_rows(4), **_RECOMPUTED}),
    "sp4-offloaded": Mode(title="SP 4, offloaded", world=4, options={**_rows(4), **_OFFLOADED}),
    "sp2-fsdp": Mode(title="SP 2 x FSDP2", world=4, options={**_rows(2), **_FSDP}),
    "sp4-fsdp": Mode(title="SP 4 x FSDP2", world=4, options={**_rows(4), **_FSDP}),
    "tp2": Mode(title="TP 2", world=2, options=_layers(2)),
    "tp2-fsdp": Mode(title="TP 2 x FSDP2", world=4, options=_layers(2)),
    "fsdp2-lora": Mode(title="FSDP2, LoRA", world=2, options=_FSDP, lora=4),
}
_LONG = ("one", "one-recomputed", "sp2", "sp4", "sp4-recomputed", "sp4-offloaded", "sp4-fsdp", "tp2")
_SHORT = tuple(name for name in MODES if name not in _LONG[4:7])

PROFILES = {
    "short": Profile(
        title="8 pairs of up to 160 positions",
        hidden=64,
        intermediate=192,
        layers=4,
        heads=8,
        kv_heads=4,
        vocab=512,
        prompt=(16, 64),
        response=(16, 48),
        pairs=8,
        steps=3,
        modes=_SHORT,
    ),
    # prompt + chosen + rejected: 16,384 positions in a step, where the last token of a response is no input
    "long": Profile(
        title="one pair of 16,384 positions",
        hidden=32,
        intermediate=64,
        layers=2,
        heads=4,
        kv_heads=2,
        vocab=64,
        prompt=(8192, 8192),
        response=(4096, 4096),
        pairs=1,
        steps=2,
        modes=_LONG,
    ),
}


def alone(mode: Mode) -> str:
    """The name of the mode of one process whose losses and sizes this one is compared with."""
    return "one-lora" if mode.lora else "one"
