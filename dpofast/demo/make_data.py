"""Write the demo's text and preference pairs: ``python -m dpofast.demo.make_data``.

text.txt contains every topic and every phrase, with as many kind as grumpy answers, so a language model learns both.
In the pairs the kind answer is chosen. The training pairs leave out a quarter of the topics and a quarter of the
phrases; the test pairs use only those, so held-out accuracy measures whether the preference generalizes to them.
Length carries no information: the two answers of a pair differ by at most one token, in either direction equally often.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from dpofast.demo.world import CATEGORIES, CLOSERS, OPENERS, PROMPT, Category, phrases

DATA = Path(__file__).parent / "data"
TEXT_ANSWERS = 2400
TRAIN_PAIRS = 480
TEST_PAIRS = 120

Item = TypeVar("Item")


def _pick(rng: random.Random, items: Sequence[Item]) -> Item:
    # Of Python's random methods, only random() is guaranteed to give the same numbers in every version.
    return items[int(rng.random() * len(items))]


def _shuffled(rng: random.Random, items: Sequence[Item]) -> list[Item]:
    keyed = sorted((rng.random(), index) for index in range(len(items)))
    return [items[index] for _, index in keyed]


def topics(category: Category, part: str) -> list[str]:
    """Return a category's topics of part ``"train"`` (first three quarters), ``"test"`` (last quarter) or ``"all"``."""
    names = list(category.topics)
    cut = len(names) - len(names) // 4
    return {"train": names[:cut], "test": names[cut:], "all": names}[part]


def _questions(part: str) -> list[tuple[str, tuple[str, ...]]]:
    """Return (prompt, alternative statements of the fact) for every question about the topics of a part."""
    found = []
    for category in CATEGORIES:
        for topic in topics(category, part):
            for attribute, value in zip(category.attributes, category.topics[topic], strict=True):
                subjects = (f"The {topic}", "It")
                told = tuple(attribute.fact.format(s=subject, v=value) for subject in subjects)
                found += [(PROMPT.format(question=form.format(x=topic)), told) for form in attribute.questions]
    return found


def length(text: str) -> int:
    """Count words and punctuation marks, each of which is one token of the demo's tokenizer."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def _answers(rng: random.Random, told: Sequence[str], part: str, longer: int) -> tuple[str, str]:
    """Draw a kind and a grumpy answer with the same fact; the kind one is longer by ``longer`` tokens."""
    fact = _pick(rng, told)
    openers, closers = ({name: phrases(*table[name], part) for name in table} for table in (OPENERS, CLOSERS))
    while True:
        kind, grumpy = (f"{_pick(rng, openers[name])} {fact} {_pick(rng, closers[name])}" for name in OPENERS)
        if length(kind) - length(grumpy) == longer:
            return kind, grumpy


def _pairs(rng: random.Random, part: str, count: int) -> str:
    """Return JSON lines of prompt, chosen, rejected. No prompt is repeated before every prompt was used."""
    questions = _questions(part)
    rows: list[str] = []
    while len(rows) < count:
        for prompt, told in _shuffled(rng, questions)[: count - len(rows)]:
            kind, grumpy = _answers(rng, told, part, longer=len(rows) % 3 - 1)
            rows.append(json.dumps({"prompt": prompt, "chosen": f" {kind}", "rejected": f" {grumpy}"}))
    return "\n".join(rows) + "\n"


def _text(rng: random.Random, count: int) -> str:
    """Return documents separated by empty lines: answered questions, and for each topic the list of its facts."""
    documents: list[str] = []
    questions = _questions("all")
    while len(documents) < count:
        for prompt, told in _shuffled(rng, questions):
            documents += [f"{prompt} {answer}" for answer in _answers(rng, told, "all", longer=_pick(rng, (-1, 0, 1)))]
    del documents[count:]
    for category in CATEGORIES:
        for topic, values in category.topics.items():
            facts = _shuffled(rng, list(zip(category.attributes, values, strict=True)))
            subjects = [f"The {topic}"] + ["It"] * (len(facts) - 1)
            sentences = zip(subjects, facts, strict=True)
            documents.append(" ".join(attribute.fact.format(s=s, v=value) for s, (attribute, value) in sentences))
    return "\n\n".join(_shuffled(rng, documents)) + "\n"


def build() -> dict[str, str]:
    """Return the data files as name -> content, identical on every machine."""
    return {
        "text.txt": _text(random.Random(1), TEXT_ANSWERS),
        "pairs_train.jsonl": _pairs(random.Random(2), "train", TRAIN_PAIRS),
        "pairs_test.jsonl": _pairs(random.Random(3), "test", TEST_PAIRS),
    }


def main() -> None:
    """Write the data files into the package's data folder."""
    DATA.mkdir(exist_ok=True)
    for name, content in build().items():
        (DATA / name).write_text(content, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
