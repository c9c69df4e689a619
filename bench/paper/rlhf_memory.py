"""Peak memory, models and settings of a method of rlhf.py, in a process of its own.

    python -m bench.paper.rlhf_memory rlhf 0 --world build/paper/rlhf --out FILE

It runs every stage of the method for two steps, since memory grows no more after the first step with the optimizer's
states. The script's own π_ref and the hidden judge, which are there before, are not counted; π_ref as a penalty's
reference is.
"""

import argparse
import dataclasses
import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from bench.cases import UNATTENDED
from bench.paper.experiment import quiet
from bench.paper.reward_model import train_reward_model
from bench.paper.rlhf import FULL, QUICK
from bench.paper.rlhf_runs import LABELS, Size, make_pairs
from bench.paper.rlhf_world import CLASSIFIER, LEXICON, World, load_world
from bench.paper.sentiment_methods import train_dpo, train_rloo
from bench.timing import PeakMemory

STEPS = 2
BETA, LEARNING_RATE = 0.5, 3e-4  # no trainer's default
# Without effect on what is learned, or derived from others.
_NO_EFFECT = (
    "output_dir",
    "logging_steps",
    "seed",
    "bf16",
    "run_name",
    "gradient_checkpointing",
    "activation_checkpointing",
)
_NO_SETTING = {*UNATTENDED, *_NO_EFFECT, "generation_batch_size"}


def alive(kind: type) -> list[Any]:
    """All objects of a class. By their type: isinstance() also asks objects that compute what they are."""
    return [thing for thing in gc.get_objects() if issubclass(type(thing), kind)]


def models_alive() -> list[PreTrainedModel]:
    """Every model that is no part of another one."""
    found = alive(PreTrainedModel)
    inner = {id(part) for model in found for part in model.modules() if part is not model}
    return [model for model in found if id(model) not in inner]


def settings_of(args: TrainingArguments) -> list[str]:
    """Names of the options that differ from their defaults."""
    plain = type(args)(output_dir=args.output_dir, bf16=False, **UNATTENDED)
    return sorted(
        field.name
        for field in dataclasses.fields(args)
        if field.init
        and not field.name.startswith("_")
        and field.name not in _NO_SETTING
        and getattr(args, field.name) != getattr(plain, field.name)
    )


class Watch:
    """What is alive after the last step of each stage."""

    def __init__(self) -> None:
        """Note what is alive already."""
        gc.collect()
        self._before = models_alive()
        self.models = 0
        self._arguments: dict[str, TrainingArguments] = {}

    def __call__(self, step: int, _: PreTrainedModel) -> None:
        """on_step of every stage."""
        if step != STEPS:
            return
        before = set(map(id, self._before))
        self.models = max(self.models, sum(id(model) not in before for model in models_alive()))
        self._arguments.update((type(args).__name__, args) for args in alive(TrainingArguments))

    def settings(self) -> dict[str, list[str]]:
        """settings_of() each stage. When all have ended: new arguments reset what a trainer has set up."""
        return {name: settings_of(args) for name, args in self._arguments.items()}


def measure(method: str, world: World, size: Size, seed: int) -> dict[str, Any]:
    """Run every stage of a method for a few steps.

    Returns:
        peak_bytes: resident memory above that with π_ref and the judge loaded. models: at most alive besides these two.
        settings: the options that each stage's trainer is given, by the class of its arguments.
    """
    watch = Watch()
    memory = PeakMemory()
    task = make_pairs(world, size, pairs=6 * size.prefixes_per_step, flipped=0.0, seed=seed)
    task = dataclasses.replace(task, steps=STEPS)
    if method == "dpo":
        train_dpo(task, BETA, LEARNING_RATE, watch)
    else:
        score = None
        if method == "rlhf":
            how = size.reward_training
            score = train_reward_model(
                world.model,
                world.tokenizer,
                task.pairs,
                how,
                seed,
                on_step=watch,
            )
            gc.collect()
        train_rloo(task, BETA, LEARNING_RATE, watch, score)
    return {"peak_bytes": memory.increase(), "models": watch.models, "settings": watch.settings()}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=LABELS)
    parser.add_argument("seed", type=int)
    parser.add_argument("--judge", choices=(LEXICON, CLASSIFIER), default=LEXICON)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--world", type=Path, required=True, help="folder of π_ref (bench/paper/rlhf_world.py)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the figures")
    args = parser.parse_args(argv)
    quiet(threads=1)
    size = QUICK if args.quick else FULL
    world = load_world(args.world, args.quick, args.judge, size.held_out)
    args.out.write_text(json.dumps(measure(args.method, world, size, args.seed)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
