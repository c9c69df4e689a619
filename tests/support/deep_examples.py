"""Examples that make tries of any depth: prompts with one system prompt, earlier turns, responses that fork late."""

import random

from hypothesis import strategies as st

from tests.support.examples import group
from tests.support.tiny import VOCAB


def written(groups, lengths):
    """Groups from letters, prompt -> responses; a letter is as many tokens as `lengths` says, else one.

    The first token of a letter is its own, so that texts fork between letters. All pairs of the first three responses,
    and neighbours.
    """

    def ids(text):
        found = []
        for letter in text:
            draw = random.Random(letter)
            found += [
                3 + ord(letter) - ord("a"),
                *(draw.randrange(3, VOCAB) for _ in range(lengths.get(letter, 1) - 1)),
            ]
        return found

    return [
        group(
            ids(prompt),
            [ids(response) for response in responses],
            [(a, b) for b in range(len(responses)) for a in range(b) if a + 1 == b or b < 3],
        )
        for prompt, responses in groups.items()
    ]


# Forks inside prompts (s), inside responses (pq, qr, qrt), between a response and a later turn (sb, then p or z);
# prompts that go on a response (sbzc), are a prompt and response themselves (sapqu) or begin them (d); responses of one
# token (o, y, e), and one that begins others (qr). Two to six branches.
SHAPE = {
    "sa": ["pqu", "pqv", "pw", "o"],
    "sb": ["pqu", "z"],
    "sbzc": ["p", "qrtu", "qrtv", "qrxw", "qr", "y"],
    "sapqu": ["p", "ux", "o"],
    "d": ["e", "fgh"],
    "de": ["fg", "f"],
}
DEEP = written(SHAPE, {"s": 6, "a": 3, "b": 2, "p": 3, "q": 4, "r": 3, "t": 2, "u": 3, "w": 2, "z": 4, "x": 2, "f": 5})
# The same with rows beyond blocks of 128 and windows that end inside ancestors
LONG_DEEP = written(SHAPE, {"s": 130, "a": 40, "p": 100, "q": 7, "r": 60, "t": 3, "u": 45, "v": 30, "z": 90, "f": 129})


def depth(segments):
    """Segments on the longest path."""
    depths = []
    for parent in segments.parents.tolist():
        depths.append(1 if parent < 0 else 1 + depths[parent])
    return max(depths)


@st.composite
def tries(draw, stretch=(1,)):
    """Up to five groups of two to six branches over three tokens; prompts may go on earlier prompts and responses.

    Each token stands for one of `stretch` tokens.
    """
    stretched = [[3 + 1000 * token + i for i in range(draw(st.sampled_from(stretch)))] for token in range(3)]
    texts = st.lists(st.integers(0, 2), min_size=1, max_size=4)
    found, sequences = [], [()]

    def ids(text):
        return [token for letter in text for token in stretched[letter]]

    for _ in range(draw(st.integers(1, 5))):
        prompt = (*draw(st.sampled_from(sequences)), *draw(st.lists(st.integers(0, 2), max_size=3))) or (0,)
        stem = draw(st.just([]) | texts)
        branches = draw(st.lists(texts, min_size=2, max_size=6, unique_by=tuple))
        branches = [tuple(stem + branch) for branch in branches]
        sequences += [prompt, *(prompt + branch for branch in branches)]
        every = [(a, b) for a in range(len(branches)) for b in range(len(branches)) if a != b]
        pairs = [(b - 1, b) for b in range(1, len(branches))] + draw(st.lists(st.sampled_from(every), max_size=4))
        found.append(group(ids(prompt), list(map(ids, branches)), pairs))
    return found
