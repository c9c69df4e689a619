"""What goes through the model in one optimizer step: positions, head rows and pairs of query and key, by layout."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Call:
    """One forward of the model.

    Attributes:
        positions: tokens through the layers, pads included.
        targets: response tokens that are scored.
        sequences, width: rows of the call and their padded length; 1 and positions where they are packed.
        visible: pairs of query and key that attention computes.
        gathered: positions whose keys and values are copied for their branch, 0 where nothing is.
    """

    positions: int
    targets: int
    sequences: int
    width: int
    visible: int
    gathered: int = 0

    @property
    def grid(self) -> int:
        """Positions that have a next token in their row, scored or not."""
        return self.sequences * (self.width - 1)


# The calls of one micro-batch, which share a backward.
MicroBatch = tuple[Call, ...]


@dataclass(frozen=True)
class Pairs:
    """Token counts of the pairs of a step, (P,) each; a response's count its end-of-sequence token."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]

    @staticmethod
    def make(count: int, prompt: float, chosen: float, rejected: float, spread: float = 0.0) -> "Pairs":
        """Pairs of these mean lengths; spread: standard deviation of the logarithm of each length, log-normal, seed 0.

        Raises:
            ValueError: the count is below 1, a length not from 1 to 1e9, the spread not from 0 to 3.
        """
        if count < 1:
            raise ValueError(f"--pairs: expected at least one, got {count}")
        if not all(1 <= mean <= 1e9 for mean in (prompt, chosen, rejected)):
            raise ValueError(
                f"--lengths: expected 1 to 1e9 tokens of each part, got {prompt:g}/{chosen:g}/{rejected:g}"
            )
        if not 0 <= spread <= 3:
            raise ValueError(f"--spread: expected a number from 0 to 3, got {spread:g}")
        random = np.random.default_rng(0)

        def lengths(mean: float) -> tuple[int, ...]:
            drawn = mean * np.exp(random.normal(-(spread**2) / 2, spread, count)) if spread else np.full(count, mean)
            return tuple(int(n) for n in np.maximum(1, np.rint(drawn)))

        return Pairs(lengths(prompt), lengths(chosen), lengths(rejected))

    def __len__(self) -> int:
        """How many pairs."""
        return len(self.prompt)

    def __getitem__(self, part: slice) -> "Pairs":
        """The pairs of a slice."""
        return Pairs(self.prompt[part], self.chosen[part], self.rejected[part])

    @property
    def tokens(self) -> int:
        """Tokens of both sequences of every pair, without pads: what tokens a second count."""
        return 2 * sum(self.prompt) + sum(self.chosen) + sum(self.rejected)

    @property
    def targets(self) -> int:
        """Response tokens."""
        return sum(self.chosen) + sum(self.rejected)


def packed(pairs: Pairs, max_tokens: int, devices: int = 1, *, shared: bool = True) -> list[MicroBatch]:
    """dpofast's micro-batches of one device, even, of at most max_tokens positions; a last token is no input.

    Args:
        pairs: of the whole step, over all devices.
        max_tokens: positions of a micro-batch, unless a pair has more.
        devices: among which positions are divided evenly.
        shared: a prompt runs once for both responses.
    """
    positions = visible = gathered = longest = 0
    for prompt, *responses in zip(pairs.prompt, pairs.chosen, pairs.rejected, strict=True):
        branches = [length - 1 for length in responses]
        pair = sum(branches) + prompt * (1 if shared else 2)
        positions, longest = positions + pair, max(longest, pair)
        visible += _triangle(prompt) * (1 if shared else 2) + sum(b * prompt + _triangle(b) for b in branches)
        gathered += sum(branches) + 2 * prompt if shared else 0
    count = devices * math.ceil(positions / devices / max(max_tokens, longest))
    parts = zip(*(even_parts(total, count) for total in (positions, pairs.targets, visible, gathered)), strict=True)
    calls = [Call(positions=p, targets=t, sequences=1, width=p, visible=v, gathered=g) for p, t, v, g in parts]
    return [(call,) for call in calls[::devices]]


def padded(pairs: Pairs, max_tokens: int) -> list[MicroBatch]:
    """Micro-batches of rows padded to the longest: chosen and rejected in one call, as trl and Liger are given them."""

    def calls(part: Pairs) -> MicroBatch:
        rows = list(zip(part.prompt, part.chosen, strict=True)) + list(zip(part.prompt, part.rejected, strict=True))
        return (_rows([p + r for p, r in rows], part.targets),)

    return [calls(part) for part in _parts(pairs, max_tokens)]


def separate(pairs: Pairs, max_tokens: int) -> list[MicroBatch]:
    """Micro-batches of padded rows with one call for the chosen and one for the rejected responses."""

    def calls(part: Pairs) -> MicroBatch:
        return tuple(
            _rows([p + r for p, r in zip(part.prompt, responses, strict=True)], sum(responses))
            for responses in (part.chosen, part.rejected)
        )

    return [calls(part) for part in _parts(pairs, max_tokens)]


def largest_share(pairs: Pairs, devices: int) -> Pairs:
    """The pairs of the device that computes most, where consecutive pairs go to each.

    Raises:
        ValueError: fewer pairs than devices.
    """
    if len(pairs) < devices:
        raise ValueError(f"expected at least as many --pairs as --devices, got {len(pairs)} and {devices}")
    each = math.ceil(len(pairs) / devices)
    return max((pairs[start : start + each] for start in range(0, len(pairs), each)), key=lambda part: part.tokens)


def even_parts(total: int, parts: int) -> list[int]:
    """A total in so many parts, the larger first, as even as whole numbers are."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def _parts(pairs: Pairs, max_tokens: int) -> list[Pairs]:
    """Consecutive pairs, as many as fit in max_tokens when all are padded to the longest, and at least one."""
    longest = max(_longest(pairs))
    each = max(1, max_tokens // (2 * longest))
    return [pairs[start : start + each] for start in range(0, len(pairs), each)]


def _longest(pairs: Pairs) -> list[int]:
    return [p + max(c, r) for p, c, r in zip(pairs.prompt, pairs.chosen, pairs.rejected, strict=True)]


def _rows(lengths: Sequence[int], targets: int) -> Call:
    """A call of rows padded to the longest; a padding mask makes attention compute every pair of positions."""
    width = max(lengths)
    positions = len(lengths) * width
    return Call(positions=positions, targets=targets, sequences=len(lengths), width=width, visible=positions * width)


def _triangle(length: int) -> int:
    return length * (length + 1) // 2
