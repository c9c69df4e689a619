"""What the experiments on the classical pipeline share: π_ref, prefixes, and the hidden judge that labels the pairs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bench.paper.judge import films_apart, judge_figures, load_judge
from bench.paper.review_lm import Prefixes, read_corpus, reference, training_figures
from bench.paper.reward import SCALE, reward
from bench.paper.sentiment_methods import Judge

LEXICON, CLASSIFIER = "lexicon", "classifier"


@dataclass(frozen=True)
class World:
    """π_ref, its tokenizer, prefixes to train on and held-out ones, and the hidden true reward of texts."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prefixes: Prefixes
    judge: Judge


def load_world(folder: Path, quick: bool, judge: str, held_out: int) -> World:
    """Train what is not in the folder yet, and read it.

    Args:
        folder: of π_ref and of the judge.
        quick: smaller models on made-up reviews.
        judge: LEXICON, vaderSentiment's (bench/paper/reward.py), or CLASSIFIER (bench/paper/judge.py). With the latter
            π_ref learns, and prefixes come from, films that the judge has not seen.
        held_out: prefixes of films that neither π_ref nor any method has seen.

    Raises:
        ValueError: there is no such judge.
    """
    if judge not in (LEXICON, CLASSIFIER):
        raise ValueError(f"judge: expected {LEXICON!r} or {CLASSIFIER!r}, got {judge!r}")
    reviews = read_corpus(quick)
    if judge == LEXICON:
        hidden = reward
    else:
        of_judge, reviews = films_apart(reviews)
        hidden = load_judge(folder / "judge", quick, of_judge)
    model, tokenizer = reference(folder / "reference", quick, reviews)
    return World(model, tokenizer, Prefixes(tokenizer, quick, held_out, reviews), hidden)


def world_figures(folder: Path, judge: str) -> dict[str, Any]:
    """What is known of the world in the folder: π_ref's figures and, of a classifier, the judge's."""
    figures = {"judge": judge, "reference": training_figures(folder / "reference")}
    return figures if judge == LEXICON else {**figures, "classifier": judge_figures(folder / "judge")}


def world_settings(folder: Path, judge: str, size: Any) -> Mapping[str, Any]:
    """The settings of an experiment in the world of the folder: its size, the judge, and what π_ref learned from."""
    known = world_figures(folder, judge)
    parts = {name: known[name]["settings"] for name in ("reference", "classifier") if name in known}
    return {**asdict(size), "judge": judge, "scale": SCALE, **parts}
