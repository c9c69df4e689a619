"""What cost.py and stability.py share: DPO and the RL loop start from one π_ref, over the same prefixes.

Both maximise E[r] − β·KL(π‖π_ref). The RL loop sees the reward itself; DPO sees which of two completions is preferred,
one draw from Bradley-Terry under the same reward.
"""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bench.paper import sentiment_methods
from bench.paper.review_lm import prefixes, read_corpus, reference, split

METHODS = {name: sentiment_methods.METHODS[name] for name in ("dpo", "rl")}
PREFIXES_PER_STEP = 16  # 64 completions in a step of either method


@dataclass(frozen=True)
class Toy:
    """π_ref, prefixes to train on, and prefixes of films that no method trains on."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prefixes: list[list[int]]
    held_out: list[list[int]]


def load_toy(folder: Path, quick: bool, count: int, held_out: int, seed: int) -> Toy:
    """π_ref from the folder, and so many prefixes of each kind; the held-out ones are the same for all seeds."""
    model, tokenizer = reference(folder, quick)
    reviews, held_out_reviews = split(read_corpus(quick))
    unseen = prefixes(held_out_reviews, tokenizer, held_out, 0)
    return Toy(model, tokenizer, prefixes(reviews, tokenizer, count, seed, excluded=unseen), unseen)
