"""What it saves and what it costs that sequences share whatever they begin with; part of bench/packing.py, one core.

    python -m bench.packing --sharing

Counts are of micro-batches of 16,384 positions. Pairs of one conversation lie in one step, in order.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bench.cases import SHARED_PROFILES
from bench.random_pairs import random_rows
from dpofast import _C
from dpofast.packing.examples import FlatExamples, read_examples
from dpofast.packing.pack import PackBuffers, pack

SHARED = ("prefix", "prompt", "none")
Columns = dict[str, tuple[np.ndarray, np.ndarray]]
Timer = Callable[[Callable[[], Any]], dict[str, float]]


def columns_of(rows: list[dict[str, np.ndarray]]) -> Columns:
    """The int32 columns, (values, offsets), of pairs as prompt, chosen, rejected."""
    columns = {}
    for name in ("prompt", "chosen", "rejected"):
        offsets = np.cumsum([0, *(len(row[name]) for row in rows)], dtype=np.int32)
        columns[f"{name}_ids"] = (np.concatenate([row[name] for row in rows]).astype(np.int32), offsets)
    return columns


def with_beginnings(columns: Columns, rng: np.random.Generator, count: int, length: int, vocab: int) -> Columns:
    """The columns with one of `count` random beginnings of `length` tokens, drawn at random, before every prompt."""
    values, offsets = columns["prompt_ids"]
    beginnings = rng.integers(0, vocab, (count, length), dtype=values.dtype)
    longer = offsets + np.arange(len(offsets), dtype=offsets.dtype) * length
    prompts = np.empty(longer[-1], values.dtype)
    own = np.ones(len(prompts), bool)
    for place in range(length):
        own[longer[:-1] + place] = False
    prompts[own] = values
    prompts[~own] = beginnings[rng.integers(0, count, len(offsets) - 1)].ravel()
    return {**columns, "prompt_ids": (prompts, longer)}


def packer(flat: FlatExamples, max_tokens: int, share: str) -> _C.Packer:
    """The examples grouped and planned."""
    return flat.packer(max_tokens=max_tokens, max_targets=_C.UNLIMITED, share=share, vocab_size=1 << 31)


def positions(max_tokens: int, pairs: int) -> dict[str, dict[str, dict[str, int]]]:
    """Of one step of every profile: positions and micro-batches for each way to share."""
    figures: dict[str, dict[str, dict[str, int]]] = {}
    for name, profile in SHARED_PROFILES.items():
        columns = columns_of(random_rows(profile, pairs))
        figures[name] = {}
        for share in SHARED:
            batches = pack(columns, max_tokens, share=share)
            figures[name][share] = {
                "positions": sum(batch.num_tokens for batch in batches),
                "micro_batches": len(batches),
            }
    return figures


def packing_time(parts: list[Columns], max_tokens: int, clock: Any) -> dict[str, Any]:
    """pack() of steps with share="prefix" and "prompt", in turns: seconds, their ratio, positions, micro-batches.

    Also in how many steps "prefix" needs more positions or more micro-batches, which should be none.
    """
    buffers = PackBuffers()

    def run(share: str) -> list[tuple[int, int]]:
        sizes = []
        for part in parts:
            batches = pack(part, max_tokens, share=share, buffers=buffers)
            sizes.append((sum(batch.num_tokens for batch in batches), len(batches)))
        return sizes

    sizes = {share: run(share) for share in SHARED[:2]}
    times: dict[str, list[float]] = {share: [] for share in sizes}
    for _ in range(clock.rounds):
        for share in sizes:
            start = clock.now()
            run(share)
            times[share].append(clock.now() - start)
    return {
        "seconds": {share: float(np.median(values)) for share, values in times.items()},
        "ratio": float(np.median(np.divide(times["prefix"], times["prompt"]))),
        "positions": {share: sum(tokens for tokens, _ in found) for share, found in sizes.items()},
        "micro_batches": {share: sum(count for _, count in found) for share, found in sizes.items()},
        "steps": len(parts),
        "larger_steps": sum(
            ours[0] > theirs[0] or ours[1] > theirs[1]
            for ours, theirs in zip(sizes["prefix"], sizes["prompt"], strict=True)
        ),
    }


def planned(columns: Columns, max_tokens: int, clock: Timer) -> dict[str, Any]:
    """Seconds from grouped examples to a plan with every micro-batch's trie, and of the whole Packer, by `share`."""
    flat = read_examples(columns)
    figures: dict[str, Any] = {"pairs": len(flat.forms), "tokens": int(flat.sequences.lengths().sum())}
    for share in SHARED[:2]:
        made = packer(flat, max_tokens, share)
        again = clock(lambda made=made: made.plan(max_tokens, _C.UNLIMITED, 1))
        figures[share] = {
            "seconds": again,
            "positions": int(made.shapes[:, 0].sum()),
            "micro_batches": len(made.shapes),
        }
    return figures


def one_micro_batch(rows: list[dict[str, np.ndarray]], max_tokens: int, clock: Timer) -> dict[str, Any]:
    """As many of the pairs as one micro-batch holds: tokens a second of its trie, and of the whole pack() call.

    Tokens are those of the sequences, prompt and response of each, as the trie's builder reads them; rows are the
    micro-batch's positions.
    """
    count = len(rows)
    while (batch := pack(columns_of(rows[:count]), share="prefix")[0]).num_tokens > max_tokens:
        count -= 1
    columns, buffers = columns_of(rows[:count]), PackBuffers()
    made = packer(read_examples(columns), _C.UNLIMITED, "prefix")
    calls = 50

    def build() -> None:
        for _ in range(calls):
            made.plan(_C.UNLIMITED, _C.UNLIMITED, 1)

    def pack_it() -> None:
        for _ in range(calls):
            pack(columns, buffers=buffers)

    trie_s, pack_s = clock(build)["median"] / calls, clock(pack_it)["median"] / calls
    tokens = sum(2 * len(row["prompt"]) + len(row["chosen"]) + len(row["rejected"]) for row in rows[:count])
    return {
        "pairs": count,
        "rows": batch.num_tokens,
        "tokens": tokens,
        "trie_s": trie_s,
        "pack_s": pack_s,
        "rows_per_second": {"trie": batch.num_tokens / trie_s, "pack": batch.num_tokens / pack_s},
        "tokens_per_second": {"trie": tokens / trie_s, "pack": tokens / pack_s},
    }


def against_tree_row(rows: list[dict[str, np.ndarray]], clock: Timer) -> dict[str, Any]:
    """One micro-batch by pack() and by trl's TreeRow: seconds, and rows, each as a trie in Python says they must be.

    TreeRow keys a node by its token and the next one: the nodes of a plain trie but the roots, and one for the end of
    every sequence. pack() gives the last token of a sequence no row, since it is only a target.

    Raises:
        ValueError: one of them has another number of rows.
    """
    from trl.experimental.async_grpo.packing import TreeRow

    columns, buffers = columns_of(rows), PackBuffers()
    sequences = [np.concatenate((row["prompt"], row[side])) for row in rows for side in ("chosen", "rejected")]
    samples = [
        {
            "input_ids": torch.from_numpy(ids),
            "completion_mask": (torch.arange(len(ids)) >= len(row["prompt"])).long(),
            "old_log_probs": torch.zeros(len(ids)),
            "advantage": 0.0,
            "group_id": index,
        }
        for index, row in enumerate(rows)
        for ids in sequences[2 * index : 2 * index + 2]
    ]

    def theirs() -> dict[str, torch.Tensor]:
        row = TreeRow()
        for sample in samples:
            row.add(sample)
        return row.pack()

    nodes, ends, starts = unique_tokens(sequences)
    found = {"dpofast": pack(columns, share="prefix")[0].num_tokens, "trl": len(theirs()["input_ids"])}
    expected = {"dpofast": unique_tokens([ids[:-1] for ids in sequences])[0], "trl": nodes - starts + ends}
    if found != expected:
        raise ValueError(f"expected {expected} rows of a trie with {nodes} unique tokens, got {found}")
    calls = 20

    def ours() -> None:
        for _ in range(calls):
            pack(columns, buffers=buffers)

    ours_s, theirs_s = clock(ours)["median"] / calls, clock(theirs)["median"]
    return {
        "pairs": len(rows),
        "tokens": sum(map(len, sequences)),
        "unique_tokens": nodes,
        "rows": found,
        "seconds": {"dpofast": ours_s, "trl": theirs_s},
        "times_faster": theirs_s / ours_s,
    }


def unique_tokens(sequences: list[np.ndarray]) -> tuple[int, int, int]:
    """Nodes of the trie of the sequences, different sequences, and different first tokens."""
    children: dict[tuple[int, int], int] = {}
    ends = set()
    for sequence in sequences:
        node = -1
        for token in sequence.tolist():
            node = children.setdefault((node, token), len(children))
        ends.add(node)
    return len(children), len(ends), sum(parent < 0 for parent, _ in children)


def report(figures: dict[str, Any]) -> list[str]:
    """The lines that are printed."""
    lines = []
    for name, by_share in figures["positions"].items():
        said = ", ".join(f"{share} {row['positions']:,} in {row['micro_batches']}" for share, row in by_share.items())
        fewer = by_share["prompt"]["positions"] / by_share["prefix"]["positions"]
        lines.append(f"{name}: positions with {said}; {fewer:.2f} times fewer than with prompt")
    for name, row in figures["packing"].items():
        lines.append(
            f"pack, {name}: prefix takes {row['ratio']:.2f} of prompt's time, {row['positions']['prefix']:,} of "
            f"{row['positions']['prompt']:,} positions; larger in {row['larger_steps']} of {row['steps']} steps"
        )
    for name, row in figures["planned"].items():
        ours, theirs = row["prefix"], row["prompt"]
        lines.append(
            f"{row['pairs']:,} pairs, {name}: planned with tries in {ours['seconds']['median']:.2f} s (prompt "
            f"{theirs['seconds']['median']:.2f} s), {ours['micro_batches']:,} micro-batches of "
            f"{ours['positions']:,} positions (prompt {theirs['micro_batches']:,} of {theirs['positions']:,})"
        )
    for name, row in figures["one_micro_batch"].items():
        rate = ", ".join(f"{what} {value / 1e6:.0f}" for what, value in row["rows_per_second"].items())
        lines.append(f"one micro-batch of {row['rows']:,}, {name}: million rows a second: {rate}")
    for name, row in figures.get("tree_row", {}).items():
        lines.append(f"{name}: {row['times_faster']:.0f} times as fast as trl's TreeRow, {row['rows']} rows")
    return lines
