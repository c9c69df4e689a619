"""Bytes a rank for each way of dividing a model over two and four ranks, counted against one process.

    python -m bench.scale                       8 pairs of short rows a step
    python -m bench.scale --profile long        one pair of 16,384 positions
    python -m bench.scale --modes fsdp2 ddp2

A few steps of dpofast.DPOTrainer on a small random Llama in float32, with AdamW; ranks are processes of this machine
that exchange through gloo, and accelerate is told that they are GPUs where it shards over nothing else. Every step of
every mode must have the loss of one process within 1e-5, or the mode is refused and the command ends with 1. Counted
are storages on the rank that has most: weights between steps; what modules have gathered of them beyond that, at most;
gradients; optimizer state; what autograd saves for the backward, at most; and what is exchanged in a step. There are no
times: such ranks say nothing about GPUs (python -m bench.roofline --scale predicts those).
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.cases import RESULTS
from bench.record import command_line, write_record
from bench.scale.modes import MODES, PROFILES, alone
from bench.scale.table import text

PACKAGES = ("torch", "transformers", "accelerate", "peft", "deepspeed")
ALLOWED = 1e-5


def count(profile: str, modes: Sequence[str]) -> dict[str, Any]:
    """Run modes of a profile, those of one process that they are compared with first, and return their figures.

    Raises:
        ValueError: a loss differs by more than ALLOWED from that of one process.
    """
    from bench.scale.rank import checkpoint_bytes, run, write_model

    wanted = list(dict.fromkeys([*map(alone, (MODES[name] for name in modes)), *modes]))
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as root:
        for name in wanted:
            folder = Path(root, name)
            write_model(folder / "model", PROFILES[profile])
            ranks = run(folder, profile, name)
            losses = ranks[0]["losses"]
            expected = figures.get(alone(MODES[name]), {"losses": losses})["losses"]
            differ = max(abs(a - b) for rank in ranks for a, b in zip(rank["losses"], expected, strict=True))
            if not differ <= ALLOWED:
                raise ValueError(
                    f"{name}: expected the losses of one process within {ALLOWED:g}, got {losses} instead of {expected}"
                )
            figures[name] = {
                "ranks": MODES[name].world,
                "losses": losses,
                "loss_difference": differ,
                "bytes": {key: max(rank["bytes"][key] for rank in ranks) for key in ranks[0]["bytes"]},
                "exchanges": ranks[0]["exchanges"],
                "checkpoint_bytes": checkpoint_bytes(folder),
            }
    return {"profile": profile, "model": PROFILES[profile].config(), "modes": figures}


def main(arguments: list[str] | None = None) -> int:
    """Command line entry; 0 when recorded, 1 when a mode's losses are not those of one process."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", choices=list(PROFILES), default="short", help="model and lengths")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), metavar="MODE", help="default: all of the profile's")
    parser.add_argument("--results", type=Path, default=RESULTS / "scale.jsonl", help="file the record is appended to")
    args = parser.parse_args(arguments)
    try:
        figures = count(args.profile, args.modes or PROFILES[args.profile].modes)
    except ValueError as error:
        print(f"error: {error}; nothing is recorded", file=sys.stderr)
        return 1
    print(text(figures))
    write_record(args.results, "scale", figures, command=command_line("bench.scale", arguments), packages=PACKAGES)
    print(f"recorded in {args.results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
