"""Speed and fill rate of the packer on one core, compared with trl's collator and trl's pack_dataset.

    python -m bench.packing
    python -m bench.packing --sharing               only what sharing beginnings is worth and costs (bench/sharing.py)

Lengths are drawn like UltraFeedback's: lognormal prompts and responses of a few hundred tokens, clipped to 2,048. All
of it runs on one core; the record says how busy the machine was.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from bench import sharing
from bench.cases import RESULTS, SEED, SHARED_PROFILES
from bench.random_pairs import random_rows
from bench.record import command_line, write_record
from bench.timing import load_at_start, spread
from dpofast.packing.examples import read_examples
from dpofast.packing.pack import PackBuffers, pack
from dpofast.packing.planner import plan

MAX_TOKENS = 16_384
VOCAB = 151_936
RANKS = 8
LONGEST = 2_048
# (median, sigma) of the lognormal lengths
PROMPT, RESPONSE = (120, 1.0), (250, 0.8)
BUSY_LOAD = 0.5
PACKAGES = ("dpofast", "torch", "numpy", "pyarrow", "trl", "datasets")


# All of it runs on one core, so on a busy machine the CPU's clock still tells what a quiet one would take.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def draw_lengths(rng: np.random.Generator, count: int, median: int, sigma: float) -> np.ndarray:
    """(count,) int64 between 4 and 2,048."""
    return np.clip(rng.lognormal(math.log(median), sigma, count), 4, LONGEST).astype(np.int64)


def pair_lengths(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count,) int64: packed tokens of pairs, P + (C - 1) + (R - 1)."""
    return sum(draw_lengths(rng, count, *shape) for shape in (PROMPT, RESPONSE, RESPONSE)) - 2


class Clock:
    """Times calls by one of CLOCKS."""

    def __init__(self, name: str, rounds: int) -> None:
        self.now, self.rounds = CLOCKS[name], rounds

    def __call__(self, call: Callable[[], Any]) -> dict[str, float]:
        """Median, p20 and p80 after one call that is not counted."""
        call()
        times = []
        for _ in range(self.rounds):
            start = self.now()
            call()
            times.append(self.now() - start)
        return spread(times)


def bound(lengths: np.ndarray, bins: int = 1) -> int:
    """The fewest micro-batches that hold the tokens, a multiple of bins."""
    return -(-int(lengths.sum()) // (MAX_TOKENS * bins)) * bins


def planning(rng: np.random.Generator, sizes: list[int], clock: Clock) -> list[dict[str, Any]]:
    """Time, fullness and distance from the lower bound with growing numbers of pairs."""
    rows = []
    for size in sizes:
        lengths = pair_lengths(rng, size)
        made = plan(lengths, MAX_TOKENS)
        seconds = clock(lambda lengths=lengths: plan(lengths, MAX_TOKENS))
        rows.append(
            {
                "pairs": size,
                "seconds": seconds,
                "micro_batches": len(made.loads),
                "lower_bound": bound(lengths),
                "full": float(lengths.sum() / (len(made.loads) * MAX_TOKENS)),
            }
        )
    return rows


def steps(rng: np.random.Generator, sizes: list[int], count: int) -> list[dict[str, Any]]:
    """Optimizer steps: how often the lower bound is missed, and how even their micro-batches are."""
    rows = []
    for size in sizes:
        missed, uneven, full = 0, [], []
        for _ in range(count):
            lengths = pair_lengths(rng, size)
            loads = plan(lengths, MAX_TOKENS).loads
            missed += len(loads) > bound(lengths)
            uneven.append(loads.max() / loads.mean() - 1)
            full.append(lengths.sum() / (len(loads) * MAX_TOKENS))
        rows.append(
            {
                "pairs": size,
                "steps": count,
                "missed": missed,
                "largest_above_mean": max(uneven),
                "full": float(np.mean(full)),
            }
        )
    return rows


def ranks(rng: np.random.Generator, sizes: list[int], count: int) -> list[dict[str, Any]]:
    """Steps over 8 ranks with equal counts: the worst token imbalance, and micro-batches above the bound."""
    rows = []
    for size in sizes:
        uneven, above = [], 0
        for _ in range(count):
            lengths = pair_lengths(rng, size)
            made = plan(lengths, MAX_TOKENS, num_ranks=RANKS, equal_counts=True)
            loads = np.add.reduceat(made.loads, made.rank_bounds[:-1])
            uneven.append(loads.max() / loads.mean() - 1)
            above += len(made.loads) > bound(lengths, RANKS)
        rows.append({"pairs": size, "steps": count, "worst_imbalance": max(uneven), "missed": above})
    return rows


def trl_fullness(rng: np.random.Generator, pairs: int) -> dict[str, Any]:
    """Pairs as sequences of their packed length through trl's pack_dataset(strategy="bfd"), and through plan."""
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar
    from trl import pack_dataset

    disable_progress_bar()
    lengths = pair_lengths(rng, pairs)
    offsets = np.concatenate(([0], lengths.cumsum())).astype(np.int32)
    ids = pa.ListArray.from_arrays(offsets, np.zeros(offsets[-1], np.int32))
    rows = len(pack_dataset(Dataset(pa.table({"input_ids": ids})), MAX_TOKENS, strategy="bfd"))
    made = plan(lengths, MAX_TOKENS)
    return {
        "pairs": pairs,
        "trl": {"micro_batches": rows, "full": float(lengths.sum() / (rows * MAX_TOKENS))},
        "dpofast": {
            "micro_batches": len(made.loads),
            "full": float(lengths.sum() / (len(made.loads) * MAX_TOKENS)),
        },
    }


def make_columns(rng: np.random.Generator, pairs: int, dtype: type) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(values, offsets) of the three columns."""
    columns = {}
    for name, shape in (("prompt_ids", PROMPT), ("chosen_ids", RESPONSE), ("rejected_ids", RESPONSE)):
        lengths = draw_lengths(rng, pairs, *shape)
        offsets = np.concatenate(([0], lengths.cumsum())).astype(np.int32)
        columns[name] = (rng.integers(0, VOCAB, int(offsets[-1])).astype(dtype), offsets)
    return columns


def cut(columns: dict[str, Any], pairs: int, step: int) -> list[dict[str, Any]]:
    """The columns of every step, sharing the values."""
    return [
        {name: (values, offsets[start : start + step + 1]) for name, (values, offsets) in columns.items()}
        for start in range(0, pairs - step + 1, step)
    ]


def filling(rng: np.random.Generator, pairs: int, step: int, clock: Clock) -> dict[str, Any]:
    """Packed tokens a second, step after step into the same buffers: writing the arrays alone, and the whole call."""
    figures: dict[str, Any] = {"pairs": pairs, "pairs_per_step": step}
    for dtype in (np.int32, np.int64):
        columns = make_columns(rng, pairs, dtype)
        cuts = cut(columns, pairs, step)
        buffers = PackBuffers()
        tokens = sum(batch.num_tokens for part in cuts for batch in pack(part, MAX_TOKENS, buffers=buffers))
        packers = []
        for part in cuts:
            flat = read_examples(part)
            packers.append(sharing.packer(flat, MAX_TOKENS, "prefix"))

        # What PackBuffers holds after the largest step, as `pack` hands it over.
        most = np.max([packer.shapes.sum(0) for packer in packers], 0)
        longs, ints = (part.numpy() for part in buffers.take(4 * int(most[0]), 4 * int(most[2:5].sum())))

        def fill_all(packers=packers, longs=longs, ints=ints):
            for packer in packers:
                packer.fill(longs, ints, 1)

        def pack_all(cuts=cuts, buffers=buffers):
            for part in cuts:
                pack(part, MAX_TOKENS, vocab_size=VOCAB, buffers=buffers)

        table = pa.table(
            {name: pa.ListArray.from_arrays(offsets, values) for name, (values, offsets) in columns.items()}
        )
        slices = [table.slice(start, step) for start in range(0, pairs - step + 1, step)]

        def pack_arrow(slices=slices, buffers=buffers):
            for part in slices:
                pack(part, MAX_TOKENS, vocab_size=VOCAB, buffers=buffers)

        name = np.dtype(dtype).name
        for what, call in (("fill", fill_all), ("pack numpy", pack_all), ("pack Arrow", pack_arrow)):
            figures[f"{what} {name}"] = tokens / clock(call)["median"]
    return figures


def collators(rng: np.random.Generator, pairs: int, step: int, clock: Clock) -> dict[str, Any]:
    """Seconds for the same examples: trl's collator, and pack from lists, arrays and columns."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    columns = make_columns(rng, pairs, np.int64)
    cuts = cut(columns, pairs, step)
    arrays = [
        [{name: values[o[i] : o[i + 1]] for name, (values, o) in part.items()} for i in range(step)] for part in cuts
    ]
    lists = [[{name: ids.tolist() for name, ids in example.items()} for example in part] for part in arrays]
    buffers = PackBuffers()
    tokens = sum(batch.num_tokens for part in cuts for batch in pack(part, MAX_TOKENS, buffers=buffers))
    theirs = DataCollatorForPreference(pad_token_id=0)

    def ours(parts: list[Any]) -> Callable[[], None]:
        def run() -> None:
            for part in parts:
                pack(part, MAX_TOKENS, vocab_size=VOCAB, buffers=buffers)

        return run

    seconds = {
        "trl, lists": clock(lambda: [theirs(part) for part in lists])["median"],
        "lists": clock(ours(lists))["median"],
        "arrays": clock(ours(arrays))["median"],
        "columns": clock(ours(cuts))["median"],
    }
    return {
        "pairs": pairs,
        "pairs_per_step": step,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": {name: tokens / value for name, value in seconds.items() if not name.startswith("trl")},
        "times_faster": {name: seconds["trl, lists"] / value for name, value in seconds.items()},
    }


def sharing_figures(rng: np.random.Generator, args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """What bench/sharing.py measures, on its profiles and on lengths like UltraFeedback's."""
    columns = make_columns(rng, args.pairs, np.int32)
    steps = {"random": columns, "20 tokens of a template": sharing.with_beginnings(columns, rng, 1, 20, VOCAB)}
    many = make_columns(rng, args.planned, np.int32)
    figures: dict[str, Any] = {
        "positions": sharing.positions(MAX_TOKENS, 64),
        "packing": {
            name: sharing.packing_time(cut(part, args.pairs, 64), MAX_TOKENS, clock) for name, part in steps.items()
        },
        "planned": {"random": sharing.planned(many, MAX_TOKENS, clock)},
    }
    many = sharing.with_beginnings(many, rng, 100, 200, VOCAB)
    figures["planned"]["100 system prompts of 200 tokens"] = sharing.planned(many, MAX_TOKENS, clock)
    rows = {name: random_rows(profile, 64) for name, profile in SHARED_PROFILES.items()}
    few = make_columns(rng, 64, np.int32)
    rows["random"] = [
        {name.removesuffix("_ids"): values[o[i] : o[i + 1]] for name, (values, o) in few.items()} for i in range(64)
    ]
    figures["one_micro_batch"] = {name: sharing.one_micro_batch(part, MAX_TOKENS, clock) for name, part in rows.items()}
    if not args.no_trl:
        figures["tree_row"] = {name: sharing.against_tree_row(part, clock) for name, part in rows.items()}
    return figures


def report(figures: dict[str, Any]) -> str:
    """What is printed."""
    if "planning" not in figures:
        return "\n".join(sharing.report(figures["sharing"]))
    lines = [f"{'pairs':>10} {'seconds':>9} {'p20':>9} {'p80':>9} {'micro-batches':>14} {'bound':>9} {'full':>8}"]
    for row in figures["planning"]:
        s = row["seconds"]
        lines.append(
            f"{row['pairs']:10,} {s['median']:9.5f} {s['p20']:9.5f} {s['p80']:9.5f} {row['micro_batches']:14,} "
            f"{row['lower_bound']:9,} {row['full']:8.3%}"
        )
    for row in figures["steps"]:
        lines.append(
            f"steps of {row['pairs']} pairs: bound missed in {row['missed']} of {row['steps']}, "
            f"{row['full']:.1%} full, largest micro-batch at most {row['largest_above_mean']:.2%} above the mean"
        )
    for row in figures["ranks"]:
        lines.append(
            f"{RANKS} ranks, {row['pairs']} pairs: worst imbalance {row['worst_imbalance']:.3%} in {row['steps']} "
            f"steps, equal counts above the bound in {row['missed']}"
        )
    trl = figures.get("trl_fullness")
    if trl:
        lines.append(
            f"{trl['pairs']:,} pairs: {trl['dpofast']['full']:.2%} full, "
            f"trl's pack_dataset(bfd) {trl['trl']['full']:.2%}"
        )
    lines += [
        f"{name}: {value / 1e6:.0f} million tokens a second"
        for name, value in figures["filling"].items()
        if not name.startswith("pairs")
    ]
    collated = figures.get("collators")
    if collated:
        for name, rate in collated["tokens_per_second"].items():
            lines.append(
                f"pack from {name}: {rate / 1e6:.0f} million tokens a second, "
                f"{collated['times_faster'][name]:.1f} times as fast as trl's collator"
            )
    return "\n".join([*lines, *sharing.report(figures["sharing"])])


def main(arguments: list[str] | None = None) -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Planning and filling on one core, beside trl's collator.")
    parser.add_argument("--largest-plan", type=int, default=10_000_000, help="pairs")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of each size")
    parser.add_argument("--pairs", type=int, default=10_240, help="pairs that are filled and collated")
    parser.add_argument("--planned", type=int, default=1_000_000, help="pairs that are planned with their tries")
    parser.add_argument("--sharing", action="store_true", help="only what sharing beginnings is worth and costs")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-trl", action="store_true", help="leave the comparisons with trl out")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: this process's own time")
    parser.add_argument("--results", type=Path, default=RESULTS / "packing.jsonl", help="the record is appended to it")
    args = parser.parse_args(arguments)
    if min(args.largest_plan, args.steps, args.pairs, args.planned, args.rounds) < 1 or args.pairs < 64:
        parser.error("expected numbers of 1 or more, and --pairs of 64 or more")
    load = load_at_start(BUSY_LOAD)
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rng, clock = np.random.default_rng(SEED), Clock(args.clock, args.rounds)
    sizes = [10**k for k in range(3, 8) if 10**k <= args.largest_plan]
    figures: dict[str, Any] = {"max_tokens": MAX_TOKENS, "clock": args.clock, "load_at_start": load}
    if not args.sharing:
        figures["planning"] = planning(rng, sizes, clock)
        figures["steps"] = steps(rng, [64, 128, 512], args.steps)
        figures["ranks"] = ranks(rng, [256, 512, 1024], max(1, args.steps // 5))
        figures["filling"] = filling(rng, args.pairs, 64, clock)
    if not args.sharing and not args.no_trl:
        figures["trl_fullness"] = trl_fullness(rng, 2 * args.pairs)
        figures["collators"] = collators(rng, args.pairs // 4, 64, clock)
    figures["sharing"] = sharing_figures(rng, args, clock)
    command = command_line("bench.packing", arguments)
    write_record(args.results, "packing", figures, command=command, packages=PACKAGES)
    print(report(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
