"""Write the demo's text and preference pairs: ``python -m dpofast.demo.make_data``.

text.txt holds every topic and every phrase, kind and grumpy in equal parts, so a language model learns both. The
pairs prefer the kind answer. Their training part leaves out a quarter of the topics and a quarter of the phrases;
the test part has only those, so held-out accuracy asks whether the preference carries over to what it never saw.
Lengths say nothing: the two answers of a pair are within one token of each other, as often longer as shorter.
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
    # Only random() is promised to give the same numbers in every Python version.
    return items[int(rng.random() * len(items))]


def _shuffled(rng: random.Random, items: Sequence[Item]) -> list[Item]:
    keyed = sorted((rng.random(), index) for index in range(len(items)))
    return [items[index] for _, index in keyed]


def topics(category: Category, part: str) -> list[str]:
    """A category's topics in ``"train"`` (the first three quarters), ``"test"`` (the last quarter) or ``"all"``."""
    names = list(category.topics)
    cut = len(names) - len(names) // 4
    return {"train": names[:cut], "test": names[cut:], "all": names}[part]


def _questions(part: str) -> list[tuple[str, tuple[str, ...]]]:
    """(prompt, the ways to state the fact) for every question about the topics of a part."""
    found = []
    for category in CATEGORIES:
        for topic in topics(category, part):
            for attribute, value in zip(category.attributes, category.topics[topic], strict=True):
                subjects = (f"The {topic}", "It")
                told = tuple(attribute.fact.format(s=subject, v=value) for subject in subjects)
                found += [(PROMPT.format(question=form.format(x=topic)), told) for form in attribute.questions]
    return found


def length(text: str) -> int:
    """Words and punctuation marks: what the demo's tokenizer makes one token each."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def _answers(rng: random.Random, told: Sequence[str], part: str, longer: int) -> tuple[str, str]:
    """A kind and a grumpy answer with the same fact, the kind one longer by ``longer`` tokens."""
    fact = _pick(rng, told)
    openers, closers = ({name: phrases(*table[name], part) for name in table} for table in (OPENERS, CLOSERS))
    while True:
        kind, grumpy = (f"{_pick(rng, openers[name])} {fact} {_pick(rng, closers[name])}" for name in OPENERS)
        if length(kind) - length(grumpy) == longer:
            return kind, grumpy


def _pairs(rng: random.Random, part: str, count: int) -> str:
    """JSON lines of prompt, chosen, rejected; no prompt comes a second time before all have come once."""
    questions = _questions(part)
    rows: list[str] = []
    while len(rows) < count:
        for prompt, told in _shuffled(rng, questions)[: count - len(rows)]:
            kind, grumpy = _answers(rng, told, part, longer=len(rows) % 3 - 1)
            rows.append(json.dumps({"prompt": prompt, "chosen": f" {kind}", "rejected": f" {grumpy}"}))
    return "\n".join(rows) + "\n"


def _text(rng: random.Random, count: int) -> str:
    """Documents with an empty line between them: answered questions, and each topic's facts told in a row."""
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
    """The data files: name -> content, the same on every machine."""
    return {
        "text.txt": _text(random.Random(1), TEXT_ANSWERS),
        "pairs_train.jsonl": _pairs(random.Random(2), "train", TRAIN_PAIRS),
        "pairs_test.jsonl": _pairs(random.Random(3), "test", TEST_PAIRS),
    }


def main() -> None:
    """Write the files into the package's data folder."""
    DATA.mkdir(exist_ok=True)
    for name, content in build().items():
        (DATA / name).write_text(content, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
