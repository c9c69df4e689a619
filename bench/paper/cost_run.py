"""One run of bench/paper/cost.py, in a process of its own: cost and quality of a method after several steps.

python -m bench.paper.cost_run dpo 0 --reference build/paper/cost/reference --out FILE
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.paper.experiment import SEEDS, quiet
from bench.paper.reward import reward
from bench.paper.rl import train_rl
from bench.paper.sampling import of_texts
from bench.paper.sentiment_methods import COMPLETIONS, train_dpo
from bench.paper.toy import METHODS, PREFIXES_PER_STEP, Toy, ToySize, load_toy
from bench.timing import PeakMemory


@dataclass(frozen=True, kw_only=True)
class Size(ToySize):
    """How much of everything.

    Attributes:
        looks: of each method, the steps after which it is looked at; the last ends the run.
        learning_rates: of each method.
    """

    looks: dict[str, tuple[int, ...]]
    learning_rates: dict[str, float]


FULL = Size(
    prefixes=2048,
    held_out=128,
    looks={"dpo": (4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 320, 384), "rl": (2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96)},
    learning_rates={"dpo": 5e-4, "rl": 5e-4},
    beta=0.5,
    seeds=SEEDS,
)
QUICK = Size(
    prefixes=128,
    held_out=16,
    looks={"dpo": (2, 4, 8, 12, 16, 24), "rl": (2, 4, 6, 8, 10)},
    learning_rates={"dpo": 1e-3, "rl": 1e-3},
    beta=0.5,
    seeds=(0,),
)


class Clock:
    """CPU seconds and wall seconds of this process while it is not paused.

    Other processes lengthen wall time several fold, but hardly the CPU seconds of a single thread.
    """

    def __init__(self) -> None:
        """Start."""
        self._spent, self._from = (0.0, 0.0), self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.process_time(), time.perf_counter()

    def seconds(self) -> dict[str, float]:
        """cpu_seconds and wall_seconds so far."""
        names = ("cpu_seconds", "wall_seconds")
        parts = zip(names, self._spent, self._from, self._now(), strict=True)
        return {name: spent + now - since for name, spent, since, now in parts}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what runs inside out of both counts."""
        cpu, wall = self.seconds().values()
        try:
            yield
        finally:
            self._spent, self._from = (cpu, wall), self._now()


def measure(method: str, toy: Toy, size: Size) -> dict[str, Any]:
    """Train with a method and evaluate the policy at each look.

    Returns:
        points: at step 0 and at each look, cpu_seconds, wall_seconds and generated_tokens so far, and what
        sampling.evaluate() says. The looks are not timed. DPO's step 0 comes when it has sampled and
        labelled; its reference pass falls between that and its first look.
        peak_bytes: resident memory above that with π_ref loaded. It is read before the first look, which would add to
        it.
    """
    points: list[dict[str, float]] = []
    peaks: list[int] = []
    memory, clock = PeakMemory(), Clock()

    def look(step: int, policy: Any, tokens: int) -> None:
        if step in size.looks[method]:
            peaks.append(memory.increase())
            with clock.paused():
                spent = {**clock.seconds(), "generated_tokens": tokens}
                points.append({"step": step, **spent, **toy.evaluated(policy)})

    steps, learning_rate = size.looks[method][-1], size.learning_rates[method]
    start = {"cpu_seconds": 0.0, "wall_seconds": 0.0, "generated_tokens": 0}
    if method == "dpo":
        task = toy.task(steps)
        tokens = sum(map(len, task.samples.completions))
        start = {**clock.seconds(), "generated_tokens": tokens}
        train_dpo(task, size.beta, learning_rate, lambda step, policy: look(step, policy, tokens))
    else:
        train_rl(
            copy.deepcopy(toy.model),
            toy.model,
            toy.tokenizer,
            toy.prefixes,
            of_texts(reward),
            beta=size.beta,
            steps=steps,
            learning_rate=learning_rate,
            seed=toy.seed,
            on_step=lambda policy, step, tokens: look(step, policy, tokens),
            max_new_tokens=toy.max_new_tokens,
            per_prefix=COMPLETIONS,
            prefixes_per_step=PREFIXES_PER_STEP,
        )
    return {"points": [{"step": 0, **start, **toy.evaluated(toy.model)}, *points], "peak_bytes": peaks[0]}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("seed", type=int)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--reference", type=Path, required=True, help="folder of bench/paper/review_lm.py's π_ref")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the figures")
    args = parser.parse_args(argv)
    quiet(threads=1)
    size = QUICK if args.quick else FULL
    toy = load_toy(args.reference, args.quick, size, args.seed)
    args.out.write_text(json.dumps(measure(args.method, toy, size)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
