"""The task that cost.py and stability.py share: DPO and the RL loop start from one π_ref, over the same prefixes.

Both maximise E[r] − β·KL(π‖π_ref). The RL loop sees the reward itself; DPO sees which of two completions is preferred,
one draw from Bradley-Terry under the same reward.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bench.paper import sentiment_methods
from bench.paper.review_lm import Prefixes, reference
from bench.paper.sampling import evaluate
from bench.paper.sentiment_methods import Task, make_task

METHODS = {name: sentiment_methods.METHODS[name] for name in ("dpo", "rl")}
PREFIXES_PER_STEP = 16  # 64 completions in a step of either method


@dataclass(frozen=True, kw_only=True)
class ToySize:
    """How much of what both experiments have.

    Attributes:
        prefixes: to train on, in each seed.
        held_out: prefixes of the evaluations.
        beta: of both methods.
        seeds: of prefixes, completions, labels and training.
        max_new_tokens: a completion's length, unless it ends before.
    """

    prefixes: int
    held_out: int
    beta: float
    seeds: tuple[int, ...]
    max_new_tokens: int = 24


@dataclass(frozen=True)
class Toy:
    """π_ref, prefixes to train on, and prefixes of films that no method trains on.

    Attributes:
        seed: of the training prefixes, completions, labels and training.
        max_new_tokens: a completion's length, unless it ends before.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prefixes: list[list[int]]
    held_out: list[list[int]]
    seed: int
    max_new_tokens: int

    def task(self, steps: int) -> Task:
        """Sample π_ref and label its completions, for so many optimizer steps."""
        return make_task(
            self.model,
            self.tokenizer,
            self.prefixes,
            max_new_tokens=self.max_new_tokens,
            steps=steps,
            seed=self.seed,
            prefixes_per_step=PREFIXES_PER_STEP,
        )

    def evaluated(self, policy: Any) -> dict[str, float]:
        """sampling.evaluate() of a policy, with the same draws for every policy of a seed."""
        draws = 2000 + self.seed
        return evaluate(policy, self.model, self.tokenizer, self.held_out, draws, max_new_tokens=self.max_new_tokens)


def load_toy(folder: Path, quick: bool, size: ToySize, seed: int) -> Toy:
    """π_ref from the folder, and prefixes of each kind; the held-out ones are the same for all seeds."""
    model, tokenizer = reference(folder, quick)
    prefixes = Prefixes(tokenizer, quick, size.held_out)
    return Toy(
        model,
        tokenizer,
        prefixes.to_train(size.prefixes, seed),
        prefixes.held_out,
        seed=seed,
        max_new_tokens=size.max_new_tokens,
    )
