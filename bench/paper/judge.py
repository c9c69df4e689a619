"""A hidden judge that is no lexicon: a classifier of whole texts, trained on reviews of films that nobody else sees.

It is a Llama of π_ref's size with weights and a tokenizer of its own: it first learns the reviews of its films as a
language model, then whether each liked the film, from beginnings of the review, since completions are no whole reviews
either. A text's reward is SCALE·(2p − 1) with p the probability that the critic liked the film: neither a
sum over words, nor free.
"""

import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from bench.paper.experiment import write_json
from bench.paper.review_lm import reference, split, training_figures
from bench.paper.reward import SCALE
from bench.paper.reward import reward as lexicon_reward
from bench.paper.reward_model import RewardModel
from bench.paper.sampling import Samples
from bench.real_pairs import Review

JUDGES_SHARE = 0.5  # of the films
SHORTEST_BEGINNING, LONGEST_BEGINNING = 4, 40  # tokens; prefix and completion have no more than 32
_FIGURES = "judge.json"  # written last


@dataclass(frozen=True, kw_only=True)
class Training:
    """How the judge learns: passes over its reviews, reviews a step, and AdamW's rate, which falls linearly to 0."""

    epochs: int
    learning_rate: float
    batch_size: int = 32
    seed: int = 0


FULL = Training(epochs=3, learning_rate=1e-3)
QUICK = Training(epochs=8, learning_rate=3e-3)


class Judge:
    """The classifier, as a reward of texts."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take a trained classifier with one output and its tokenizer."""
        self._score, self._tokenizer = RewardModel(model), tokenizer

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(B,) float32 in (−SCALE, SCALE): SCALE·(2p − 1) = SCALE·tanh(logit / 2)."""
        # A text without a token (nothing but an end) is read as an end.
        return self.of_ids([row or [self._tokenizer.eos_token_id] for row in self._tokenizer(list(texts))["input_ids"]])

    def of_ids(self, ids: Sequence[list[int]]) -> Tensor:
        """(B,) float32: the same of token ids, at least one each."""
        return SCALE * torch.tanh(self._score(Samples([[] for _ in ids], list(ids), [""] * len(ids))) / 2)


def films_apart(reviews: Sequence[Review]) -> tuple[list[Review], list[Review]]:
    """The judge's reviews, and those of all other films. The same for the same reviews."""
    films = sorted({review.film for review in reviews})
    random.Random(1).shuffle(films)
    judges = set(films[: round(JUDGES_SHARE * len(films))])
    return [r for r in reviews if r.film in judges], [r for r in reviews if r.film not in judges]


def labelled(reviews: Sequence[Review], quick: bool) -> list[Review]:
    """The reviews with their own labels; quick: made-up ones, whose labels say nothing, get the sign of the lexicon's.

    Made-up reviews without a good or a bad word are left out.
    """
    if not quick:
        return list(reviews)
    values = lexicon_reward([review.text for review in reviews]).tolist()
    return [replace(r, fresh=value > 0) for r, value in zip(reviews, values, strict=True) if value]


def load_judge(folder: Path, quick: bool, reviews: Sequence[Review]) -> Judge:
    """The judge, trained once on its films' reviews and then read from the folder; see judge_figures().

    Args:
        folder: where it is stored; a judge trained otherwise is replaced.
        quick: a much smaller one.
        reviews: of the judge's films; split() holds some films out to measure its accuracy on.
    """
    training = QUICK if quick else FULL
    train, held_out = (labelled(part, quick) for part in split(reviews))
    language_model, tokenizer = reference(folder / "language_model", quick, reviews)
    settings = {**asdict(training), "language_model": training_figures(folder / "language_model")["settings"]}
    figures = folder / _FIGURES
    if figures.exists() and json.loads(figures.read_text())["settings"] == settings:
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
        return Judge(model, AutoTokenizer.from_pretrained(folder))
    figures.unlink(missing_ok=True)
    judge = Judge(_train(language_model, tokenizer, train, training, folder), tokenizer)
    beginnings = [ids[:LONGEST_BEGINNING] for ids in tokenizer([review.text for review in held_out])["input_ids"]]
    right = (judge.of_ids(beginnings) > 0) == torch.tensor([review.fresh for review in held_out])
    tokenizer.save_pretrained(folder)
    write_json(
        figures,
        {
            "settings": settings,
            "reviews": len(train),
            "held_out_reviews": len(held_out),
            "held_out_accuracy": float(right.float().mean()),
            "held_out_fresh": sum(review.fresh for review in held_out) / len(held_out),
        },
    )
    return judge


def judge_figures(folder: Path) -> dict[str, Any]:
    """What load_judge() wrote down: settings, reviews, held_out_reviews, held_out_accuracy, held_out_fresh."""
    return json.loads((folder / _FIGURES).read_text())


def _train(
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reviews: Sequence[Review],
    training: Training,
    folder: Path,
) -> PreTrainedModel:
    """The language model with a scalar head, by the cross-entropy of fresh against rotten; stored in the folder."""
    with tempfile.TemporaryDirectory() as plain:
        language_model.save_pretrained(plain)
        torch.manual_seed(training.seed)
        model = AutoModelForSequenceClassification.from_pretrained(plain, num_labels=1, dtype=torch.float32)
    rows = tokenizer([review.text for review in reviews])["input_ids"]
    rng = random.Random(training.seed)
    steps = training.epochs * (len(rows) // training.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    for _ in range(steps):
        batch = rng.sample(range(len(rows)), training.batch_size)
        # A completion is a review's beginning.
        beginnings = [rows[n][: rng.randint(SHORTEST_BEGINNING, LONGEST_BEGINNING)] for n in batch]
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row) for row in beginnings], batch_first=True, padding_value=tokenizer.pad_token_id
        )
        logits = model(input_ids=ids, attention_mask=ids.ne(tokenizer.pad_token_id).long(), use_cache=False).logits
        targets = torch.tensor([float(reviews[n].fresh) for n in batch])
        F.binary_cross_entropy_with_logits(logits[:, 0], targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    model.save_pretrained(folder)
    return model
