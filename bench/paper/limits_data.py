"""The preference sets of limits.py, as token ids."""

from collections.abc import Callable

import numpy as np
from datasets import Dataset

from bench.paper.toy_language import TOPICS, prompt_of, response, words_of

# Rates of words of the topic in the chosen and in the rejected response; the language's own is toy_language.USUAL.
FAIR, LONGER = (0.4, 0.2), (0.6, 0.4)
# Of the longer set: the share of pairs whose chosen response is the longer one.
CHOSEN_LONGER = 0.7

_Pair = tuple[list[int], list[int]]


def preferences(kind: str, count: int, *, seed: int) -> Dataset:
    """`count` pairs of one of SETS, with columns prompt_ids, chosen_ids, rejected_ids."""
    draw = np.random.default_rng(seed)
    rows = []
    while len(rows) < count:
        topic = int(draw.integers(TOPICS))
        pair = SETS[kind](topic, draw)
        if pair is not None:
            rows.append({"prompt_ids": prompt_of(topic), "chosen_ids": pair[0], "rejected_ids": pair[1]})
    return Dataset.from_list(rows)


def _fair(topic: int, draw: np.random.Generator) -> _Pair | None:
    """The chosen response has more words of the topic; length is independent of the preference."""
    return _richer(topic, draw, FAIR, longer=0.5)


def _longer(topic: int, draw: np.random.Generator) -> _Pair | None:
    """The same, but the chosen one is longer in CHOSEN_LONGER of the pairs; both have more topic words than usual."""
    return _richer(topic, draw, LONGER, longer=CHOSEN_LONGER)


def _richer(topic: int, draw: np.random.Generator, rates: tuple[float, float], *, longer: float) -> _Pair | None:
    chosen, rejected = (response(topic, draw, rate=rate) for rate in rates)
    if len(chosen) == len(rejected) or (len(chosen) > len(rejected)) != (draw.random() < longer):
        return None
    return chosen, rejected


def _alike(topic: int, draw: np.random.Generator) -> _Pair | None:
    """Two responses that differ in one word: a topic's first word is chosen where its second is rejected."""
    chosen = response(topic, draw)
    first, second, _ = words_of(topic)
    places = [place for place, token in enumerate(chosen) if token == first]
    if not places:
        return None
    rejected = list(chosen)
    rejected[int(draw.choice(places))] = second
    return chosen, rejected


SETS: dict[str, Callable[[int, np.random.Generator], _Pair | None]] = {
    "fair": _fair,
    "longer": _longer,
    "alike": _alike,
}
