"""The runs of rlhf.py: what all methods of a seed start from, each method's run with its clock, and checks of equality.

    dpo    DPO on the pairs (dpofast.DPOTrainer)
    rlhf   the classical pipeline: a reward model fitted to the same pairs, then RLOO on it with a KL penalty
    rl     RLOO on the hidden true reward, which nobody has: the upper reference

All start from π_ref's weights. The prompts of the RL loops are those of the pairs.
"""

import functools
import hashlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from bench.paper.cost_run import Clock
from bench.paper.reward_model import RewardModel, RewardTraining, accuracy, train_reward_model
from bench.paper.rlhf_world import World
from bench.paper.sampling import Samples, evaluate, of_texts, sample
from bench.paper.sentiment_methods import (
    PAIRS_PER_PREFIX,
    Example,
    Task,
    make_task,
    preference_pairs,
    train_dpo,
    train_rloo,
)
from dpofast.report.training_plot import BLUE, ORANGE

LABELS = {"dpo": "DPO", "rlhf": "reward model + RL", "rl": "RL on the true reward"}
COLORS = {"dpo": BLUE, "rlhf": "#dc2626", "rl": ORANGE}
# Pairs of equal completions say nothing and are left out: so many prefixes more are sampled, a share and a number.
_SPARE_SHARE, _SPARE = 0.03, 8

Grid = tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of everything.

    Attributes:
        pairs: of each seed, to train on.
        looks: of each method, the optimizer steps after which a policy is evaluated; the last ends the run. As many of
            each method; a step of RL costs several of DPO's, since it samples.
        tuning_runs: (β, learning rate) that each method may try.
        grids: those of each method.
        reward_training: of the reward model, untuned: one setting.
        held_out: prefixes of all evaluations.
        per_prefix: completions of each in an evaluation.
        pool: completions of each from π_ref: for best of N, held-out pairs, and to standardize rewards by.
        best_of: the N.
        seeds: of prefixes, completions, labels, training and evaluation.
        max_new_tokens: a completion's length, unless it ends before.
        prefixes_per_step: in an optimizer step, with four completions each.
    """

    pairs: int
    looks: dict[str, tuple[int, ...]]
    tuning_runs: int
    grids: dict[str, Grid]
    reward_training: RewardTraining
    held_out: int
    per_prefix: int
    pool: int
    best_of: tuple[int, ...]
    seeds: tuple[int, ...]
    max_new_tokens: int = 24
    prefixes_per_step: int = 16


def weights_fingerprint(model: PreTrainedModel) -> str:
    """32 hex digits over the weights without the head, which a policy and a reward model begin with alike."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.base_model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def ids_fingerprint(values: Any) -> str:
    """32 hex digits over token ids, in their order."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]


def prompts_of(pairs: Sequence[Example]) -> list[list[int]]:
    """The distinct prompts, in order."""
    return [list(ids) for ids in dict.fromkeys(tuple(pair["prompt_ids"]) for pair in pairs)]


def flip(pairs: Sequence[Example], share: float, seed: int) -> list[Example]:
    """Chosen and rejected change places with probability `share`; the flips of a larger share contain a smaller's."""
    draws = random.Random(seed)
    return [
        {"prompt_ids": p["prompt_ids"], "chosen_ids": p["rejected_ids"], "rejected_ids": p["chosen_ids"]}
        if draws.random() < share
        else p
        for p in pairs
    ]


def make_pairs(world: World, size: Size, pairs: int, flipped: float, seed: int) -> Task:
    """Sample π_ref, label by Bradley-Terry under the hidden judge, and keep exactly so many pairs and their prompts.

    Raises:
        ValueError: too many pairs are of equal completions.
    """
    count = math.ceil(pairs / PAIRS_PER_PREFIX * (1 + _SPARE_SHARE)) + _SPARE
    task = make_task(
        world.model,
        world.tokenizer,
        world.prefixes.to_train(count, seed),
        max_new_tokens=size.max_new_tokens,
        steps=1,
        seed=seed,
        prefixes_per_step=size.prefixes_per_step,
        judge=world.judge,
    )
    if len(task.pairs) < pairs:
        raise ValueError(f"pairs: expected at least {pairs} of {count} prefixes, got {len(task.pairs)}: sample more")
    kept = flip(task.pairs[:pairs], flipped, seed)
    return replace(task, pairs=kept, prefixes=prompts_of(kept))


class Inputs:
    """What all methods of a seed start from: the pairs, and the reward model fitted to them.

    Attributes:
        task: π_ref, the pairs and their prompts.
        reward_model: fitted to the pairs.
        spent: cpu_seconds and wall_seconds of "labels" (sampling π_ref and labelling) and "reward_model".
        sampled_tokens: of the pairs' completions.
        checks: of the reward model: fingerprints of the weights that it began with and of what it was trained on.
    """

    def __init__(self, world: World, size: Size, seed: int, *, pairs: int | None = None, flipped: float = 0.0) -> None:
        """Sample, label, and fit the reward model.

        Args:
            world: π_ref, prefixes and judge.
            size: how much.
            seed: of everything that is drawn.
            pairs: other than size.pairs.
            flipped: share of the labels that are turned round.
        """
        self.world, self.size, self.seed = world, size, seed
        clock = Clock()
        self.task = make_pairs(world, size, size.pairs if pairs is None else pairs, flipped, seed)
        self.spent = {"labels": clock.seconds()}
        self.sampled_tokens = sum(map(len, self.task.samples.completions))
        self.checks = {
            "pairs": ids_fingerprint(self.task.pairs),
            "prompts": ids_fingerprint(prompts_of(self.task.pairs)),
        }

        def at_start(step: int, model: PreTrainedModel) -> None:
            if step == 0:
                with clock.paused():
                    self.checks["start"] = weights_fingerprint(model)

        clock = Clock()
        self.reward_model = train_reward_model(
            world.model, world.tokenizer, self.task.pairs, size.reward_training, seed, on_step=at_start
        )
        self.spent["reward_model"] = clock.seconds()
        # What π_ref has, on the draws of this seed's evaluations; every run's step 0.
        self.start = functools.cache(lambda: self.evaluated(world.model))

    def evaluated(self, policy: PreTrainedModel) -> dict[str, float]:
        """sampling.evaluate() on held-out prefixes; "reward" is the hidden judge's, "modelled" the reward model's."""
        world, size = self.world, self.size
        scores = {"reward": of_texts(world.judge), "modelled": self.reward_model}
        return evaluate(
            policy,
            world.model,
            world.tokenizer,
            world.prefixes.held_out,
            2000 + self.seed,
            per_prefix=size.per_prefix,
            max_new_tokens=size.max_new_tokens,
            scores=scores,
        )

    def pool(self) -> dict[str, Any]:
        """The reward model, and π_ref's own samples under it and under the judge.

        Returns:
            rewards, modelled: (held-out prefixes, size.pool) lists. accuracy: of the reward model on pairs of these
            samples, labelled as those to train on; judge_accuracy: what the hidden judge itself has there, as labels
            are drawn. best_of_spent: seconds of sampling and scoring one completion, the mean.
            spent, sampled_tokens, checks, start: the attributes' own.
        """
        world, size, held_out = self.world, self.size, self.world.prefixes.held_out
        clock = Clock()
        samples = sample(world.model, world.tokenizer, held_out, size.pool, size.max_new_tokens, 1000 + self.seed)
        modelled = self.reward_model(samples)
        spent = {name: value / len(samples.texts) for name, value in clock.seconds().items()}
        rewards = world.judge(samples.texts)
        pairs = preference_pairs(samples, rewards, 1000 + self.seed)
        return {
            "rewards": _rows(rewards, len(held_out)),
            "modelled": _rows(modelled, len(held_out)),
            "accuracy": accuracy(self.reward_model, pairs, world.tokenizer),
            "judge_accuracy": accuracy(of_texts(world.judge), pairs, world.tokenizer),
            "held_out_pairs": len(pairs),
            "best_of_spent": spent,
            "spent": self.spent,
            "sampled_tokens": self.sampled_tokens,
            "checks": self.checks,
            "start": self.start(),
        }

    def run(self, method: str, beta: float, learning_rate: float) -> dict[str, Any]:
        """Train by a method.

        Returns:
            points: at step 0 and at each look, the run's own cpu_seconds, wall_seconds and generated_tokens so far
            (evaluations, and what comes before the run, are not in them), and what evaluated() says.
            checks: fingerprints of the weights that the run began with, and of the pairs and prompts that it got.
        """
        looks = self.size.looks[method]
        task = replace(self.task, steps=looks[-1])
        tokens = [0]
        checks: dict[str, str] = {}
        start = self.start()
        points: list[dict[str, float]] = []
        clock = Clock()

        def look(step: int, policy: PreTrainedModel) -> None:
            if step != 0 and step not in looks:
                return
            spent = {**clock.seconds(), "generated_tokens": tokens[0]}
            with clock.paused():
                if step == 0:
                    checks["start"] = weights_fingerprint(policy)
                points.append({"step": step, **spent, **(self.evaluated(policy) if step else start)})

        def counted(samples: Samples) -> torch.Tensor:
            tokens[0] += sum(map(len, samples.completions))
            return score(samples)

        if method == "dpo":
            checks |= {"pairs": ids_fingerprint(task.pairs), "prompts": ids_fingerprint(prompts_of(task.pairs))}
            train_dpo(task, beta, learning_rate, look)
        else:
            checks["prompts"] = ids_fingerprint(task.prefixes)
            if method == "rlhf":
                checks["pairs"] = self.checks["pairs"]
            score: RewardModel | Any = self.reward_model if method == "rlhf" else of_texts(task.judge)
            train_rloo(task, beta, learning_rate, look, counted)
        return {"points": points, "checks": checks}


def _rows(values: torch.Tensor, count: int) -> list[list[float]]:
    return [[round(value, 4) for value in row] for row in values.view(count, -1).tolist()]


def check_equal_start(cells: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that all cells of a seed began with the same weights, pairs and prompts.

    Args:
        cells: of one seed and one set of pairs, each with "checks".

    Raises:
        ValueError: two differ, or a cell of a method that trains on pairs does not say which.
    """
    for what in ("start", "pairs", "prompts"):
        seen: dict[str, str] = {}
        for name, cell in cells.items():
            if what in cell["checks"]:
                seen.setdefault(cell["checks"][what], name)
            elif not (what == "pairs" and name.startswith("rl_")):
                raise ValueError(f"{name}: expected a fingerprint of its {what}, got {sorted(cell['checks'])}")
        if len(seen) > 1:
            told = ", ".join(f"{name}: {fingerprint}" for fingerprint, name in seen.items())
            raise ValueError(f"{what}: expected the same for all methods of a seed, got {told}; delete the cells")


def check_equal_budget(runs: Mapping[str, Sequence[Mapping[str, Any]]], size: Size) -> None:
    """Check that every method has had size.tuning_runs runs, each with as many looks, after size.looks.

    Args:
        runs: method -> its cells of one seed and one set of pairs.
        size: what is due.

    Raises:
        ValueError: a method has had other runs.
    """
    counts = {method: len(of_method) for method, of_method in runs.items()}
    if set(counts.values()) != {size.tuning_runs}:
        raise ValueError(f"grids: expected {size.tuning_runs} tuning runs of each method, got {counts}")
    if len({len(size.looks[method]) for method in runs}) > 1:
        raise ValueError(f"looks: expected as many of each method, got {size.looks}")
    for method, of_method in runs.items():
        due = [0, *size.looks[method]]
        for cell in of_method:
            looks = [point["step"] for point in cell["points"]]
            if looks != due:
                raise ValueError(f"{method}: expected looks after the steps {due}, got {looks}")
