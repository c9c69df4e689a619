"""Constants that the benchmarks share: seeds, length profiles, settings of a step; and how to find packaged inputs."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = 0
# Of one optimizer step. trl then needs about half of 24 GiB on the long profile, so the machine never swaps.
PAIRS_PER_STEP = 8
RESULTS = Path(__file__).parent / "results"
# Of a trainer's arguments: it trains on the CPU, saves nothing and prints nothing.
UNATTENDED: dict[str, Any] = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}


@dataclass(frozen=True, kw_only=True)
class PairProfile:
    """Lengths of the pairs that bench/real_pairs.py makes; SmolLM2's tokenizer turns a word into about 1.35 tokens.

    Attributes:
        review_words: least and most words of a review.
        reviews_joined: least and most reviews of one verdict that are joined into one response, at random.
        context_words: the prompt quotes other reviews of the film until it holds this many words; 0: none.
    """

    review_words: tuple[int, int]
    reviews_joined: tuple[int, int]
    context_words: int


# Lengths vary as they do in such reviews, by a factor of three or more between responses.
PROFILES = {
    # prompts of about 20 tokens, responses of about 40
    "short": PairProfile(review_words=(10, 50), reviews_joined=(1, 2), context_words=0),
    # prompts of about 150 tokens, responses of about 60
    "long": PairProfile(review_words=(10, 50), reviews_joined=(1, 3), context_words=86),
    # prompts of about 600 tokens, responses of about 100
    "longest": PairProfile(review_words=(10, 50), reviews_joined=(3, 5), context_words=400),
}


@dataclass(frozen=True, kw_only=True)
class RandomProfile:
    """A random model and random pairs (bench/random_pairs.py); lengths are log-normal, in tokens.

    Attributes:
        prompt_median, response_median: medians of the two lengths.
        system: tokens that every prompt begins with, such as definitions of tools.
        turns: least and most turns of a conversation, which has a pair at every turn: the prompt of a later one holds
            the prompt and the chosen response of the one before.
        fork: part of the shorter response that both of a pair begin with.
        sigma: standard deviation of a length's logarithm; 0.5 puts one in forty beyond 2.7 medians.
        vocab_size, hidden_size, layers: a Llama's, with Qwen2's vocabulary and heads of 64.
    """

    prompt_median: int
    response_median: int
    system: int = 0
    turns: tuple[int, int] = (1, 1)
    fork: float = 0.0
    sigma: float = 0.5
    vocab_size: int = 151_936
    hidden_size: int = 256
    layers: int = 4


_SMALL: dict[str, int] = {"vocab_size": 2048, "hidden_size": 128, "layers": 2}
# What sequences share beyond a pair's prompt. The models are small, so that trl gets through 64 such pairs.
SHARED_PROFILES = {
    # the mean prompt has 100 tokens of its own, the mean response 150
    "tools": RandomProfile(
        prompt_median=88, response_median=132, system=2000, vocab_size=8192, hidden_size=128, layers=2
    ),
    "turns": RandomProfile(prompt_median=80, response_median=150, turns=(2, 6), **_SMALL),
    "steps": RandomProfile(prompt_median=120, response_median=400, fork=0.5, **_SMALL),
}
# Named by prompt length over response length; "medium" for trl with and without patch_trl(), at two vocabularies.
RANDOM_PROFILES = {
    "medium": RandomProfile(prompt_median=148, response_median=121),
    "medium-49k": RandomProfile(prompt_median=148, response_median=121, vocab_size=49_152),
    "ratio-0.4": RandomProfile(prompt_median=60, response_median=150),
    "ratio-2": RandomProfile(prompt_median=240, response_median=120),
    "ratio-10": RandomProfile(prompt_median=600, response_median=60),
    **SHARED_PROFILES,
}


def package_folder(module: str, install: str) -> Path:
    """Folder of an installed package, found without importing it (its own dependencies may be absent).

    Args:
        module: import name of the package.
        install: the command that installs it, for the message.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the Python package {module!r} is not installed here; install it with: {install}")
    return Path(spec.submodule_search_locations[0])
