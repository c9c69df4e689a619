"""From the cells of rlhf.py to its figures: rewards at equal divergence, over-optimization, costs, and the claims."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bench.paper import frontier
from bench.paper.cost import crossing
from bench.paper.experiment import mean_and_error
from bench.paper.rlhf_claims import claim, decide
from bench.paper.rlhf_runs import LABELS, Size, check_equal_budget, check_equal_start
from bench.paper.stability import collapse

# Nats at which methods are compared.
LEVELS = (0.5, 1.0, 2.0)
# Of the gain over π_ref that the best runs of DPO and of the pipeline both reach, in a seed.
COMMON_SHARE = 0.75
BEST_OF_N = "best_of_n"
CLOCKS = ("cpu_seconds", "wall_seconds")
Cells = Mapping[str, Mapping[str, Any]]


class Seed:
    """The checked cells of one seed and one set of pairs.

    Attributes:
        pool: what Inputs.pool() returned.
        runs: method -> the figures of its runs, each with its beta and learning_rate, in the order of the grid.
    """

    def __init__(self, found: Cells, size: Size, suffix: str) -> None:
        """Pick "pool_<suffix>" and "<method>_<β>_<rate>_<suffix>".

        Raises:
            ValueError: the methods had not the same start or not the same budget.
        """
        self.pool = found[f"pool_{suffix}"]
        names = {
            method: [f"{method}_{b:g}_{rate:g}_{suffix}" for b, rate in grid] for method, grid in size.grids.items()
        }
        check_equal_start({"pool": self.pool, **{name: found[name] for of in names.values() for name in of}})
        check_equal_budget({method: [found[name] for name in of_method] for method, of_method in names.items()}, size)
        self.runs = {
            method: [
                {**found[name], "beta": beta, "learning_rate": rate}
                for name, (beta, rate) in zip(names[method], grid, strict=True)
            ]
            for method, grid in size.grids.items()
        }
        self.rewards, self.modelled = (torch.tensor(self.pool[name]) for name in ("rewards", "modelled"))

    def before(self, method: str) -> dict[str, float]:
        """CPU and wall seconds that a method has spent before its first step on a policy."""
        stages = {"dpo": ("labels",), "rlhf": ("labels", "reward_model"), "rl": ()}[method]
        return {clock: sum(self.pool["spent"][stage][clock] for stage in stages) for clock in CLOCKS}

    def from_nothing(self, method: str, run: Mapping[str, Any]) -> list[dict[str, float]]:
        """A run's points, with everything counted that came before."""
        before = {**self.before(method), "generated_tokens": 0 if method == "rl" else self.pool["sampled_tokens"]}
        return [{**point, **{name: point[name] + before[name] for name in before}} for point in run["points"]]

    def best_of(self, n: int) -> dict[str, float]:
        """Best of n: the hidden reward and the model's own of the reward model's choice, and the judge's choice."""
        return {
            "reward": frontier.best_of_n(self.rewards, n, self.modelled),
            "modelled": frontier.best_of_n(self.modelled, n),
            "by_judge": frontier.best_of_n(self.rewards, n),
        }

    def level(self, method: str, kl: float, best_of: Sequence[int]) -> float:
        """The largest hidden reward at a divergence of at most `kl`, of a method's policies or a mixture of them."""
        if method == BEST_OF_N:
            points = [(frontier.best_of_n_kl_bound(n), self.best_of(n)["reward"]) for n in best_of]
        else:
            points = [(p["kl"], p["reward"]) for run in self.runs[method] for p in run["points"][1:]]
        return frontier.hull_reward([(0.0, float(self.rewards.mean())), *points], kl)

    def standardized(self, point: Mapping[str, float]) -> dict[str, float]:
        """Hidden and modelled reward in standard deviations of π_ref's samples above their mean."""
        pools = {"reward": self.rewards, "modelled": self.modelled}
        return {name: (point[name] - float(pool.mean())) / float(pool.std()) for name, pool in pools.items()}

    def to_common(self) -> dict[str, dict[str, float]] | None:
        """What the cheapest runs of DPO and the pipeline spent until the common reward; None without a gain."""
        start = self.pool["start"]["reward"]
        methods = [method for method in ("dpo", "rlhf") if method in self.runs]
        best = {m: max(p["reward"] for run in self.runs[m] for p in run["points"]) for m in methods}
        gain = min(best.values()) - start
        if gain <= 0:
            return None
        target = start + COMMON_SHARE * gain
        spent = {}
        for method in methods:
            reached = [run for run in self.runs[method] if max(p["reward"] for p in run["points"]) >= target]
            crossings = [crossing(self.from_nothing(method, run), target) for run in reached]
            spent[method] = {**min(crossings, key=lambda at: at["cpu_seconds"]), "gain": target - start}
        return spent

    def collapsed(self, method: str) -> list[str | None]:
        """Why each run has collapsed at its end, by the rule of stability.py."""
        return [collapse(run["points"][-1], self.pool["start"], run["beta"]) for run in self.runs[method]]

    def spread(self, method: str) -> float:
        """Standard deviation of gain − β·KL at the end over the learning rates, the mean over β."""
        by_beta: dict[float, list[float]] = {}
        for run in self.runs[method]:
            last = run["points"][-1]
            objective = last["reward"] - self.pool["start"]["reward"] - run["beta"] * last["kl"]
            by_beta.setdefault(run["beta"], []).append(objective)
        return statistics.fmean(statistics.pstdev(values) for values in by_beta.values())


def collect(found: Cells, size: Size) -> dict[str, Any]:
    """Cells -> what is drawn, printed and recorded: (mean, standard error) over seeds.

    Raises:
        ValueError: the methods had not the same start or not the same budget.
    """
    seeds = [Seed(found, size, str(seed)) for seed in size.seeds]
    if len({seed.pool["checks"]["start"] for seed in seeds}) > 1:
        raise ValueError("start: expected the same weights of π_ref in all seeds; delete the cells")
    levels = {
        method: [[seed.level(method, kl, size.best_of) for seed in seeds] for kl in LEVELS]
        for method in (*size.grids, BEST_OF_N)
    }
    memory = {
        method: [found[f"memory_{method}_{seed}"] for seed in size.seeds]
        for method in size.grids
        if f"memory_{method}_{size.seeds[0]}" in found
    }
    return {
        "reference": {
            name: mean_and_error([seed.pool["start"][name] for seed in seeds])
            for name in ("reward", "modelled", "length", "distinct_2")
        },
        "reward_model": {
            name: mean_and_error([seed.pool[name] for seed in seeds])
            for name in ("accuracy", "judge_accuracy", "held_out_pairs")
        },
        "points": [point for method in size.grids for point in _points(seeds, method)],
        "levels": {"kl": list(LEVELS), **{m: [mean_and_error(v) for v in of] for m, of in levels.items()}},
        "best_of_n": [_best_of_n(seeds, n) for n in size.best_of],
        "costs": {method: _costs(seeds, method, memory.get(method)) for method in size.grids},
        "best_of_seconds": mean_and_error([seed.pool["best_of_spent"]["cpu_seconds"] for seed in seeds]),
        "claims": _claims(seeds, levels, memory),
        "checks": {"equal_start": True, "tuning_runs": size.tuning_runs, "weights": seeds[0].pool["checks"]["start"]},
        "seconds": sum(cell["seconds"] for cell in found.values()),
    }


def _points(seeds: Sequence[Seed], method: str) -> list[dict[str, Any]]:
    """A method's looks, each the mean over seeds, with both rewards also standardized."""
    rows = []
    for number, run in enumerate(seeds[0].runs[method]):
        for look, point in enumerate(run["points"]):
            of_seeds = [seed.runs[method][number]["points"][look] for seed in seeds]
            spans = [seed.standardized(p) for seed, p in zip(seeds, of_seeds, strict=True)]
            names = ("kl", "reward", "modelled", "length", "distinct_2")
            rows.append(
                {
                    "method": method,
                    "beta": run["beta"],
                    "learning_rate": run["learning_rate"],
                    "step": point["step"],
                    **{name: mean_and_error([p[name] for p in of_seeds]) for name in names},
                    "true_z": mean_and_error([s["reward"] for s in spans]),
                    "modelled_z": mean_and_error([s["modelled"] for s in spans]),
                }
            )
    return rows


def _best_of_n(seeds: Sequence[Seed], n: int) -> dict[str, Any]:
    of_seeds = [seed.best_of(n) for seed in seeds]
    spans = [seed.standardized(row) for seed, row in zip(seeds, of_seeds, strict=True)]
    return {
        "n": n,
        "kl_bound": frontier.best_of_n_kl_bound(n),
        **{name: mean_and_error([row[name] for row in of_seeds]) for name in ("reward", "modelled", "by_judge")},
        "true_z": mean_and_error([s["reward"] for s in spans]),
        "modelled_z": mean_and_error([s["modelled"] for s in spans]),
    }


def _costs(seeds: Sequence[Seed], method: str, memory: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
    """What a method costs, with everything counted but the evaluations."""
    figures: dict[str, Any] = {}
    for clock in CLOCKS:
        before = [seed.before(method)[clock] for seed in seeds]
        steps = [[run["points"][-1][clock] for run in seed.runs[method]] for seed in seeds]
        figures[clock] = {
            "before": mean_and_error(before),
            "steps": mean_and_error([statistics.fmean(of_seed) for of_seed in steps]),
            "one_run": mean_and_error([b + statistics.fmean(of) for b, of in zip(before, steps, strict=True)]),
            "all_runs": mean_and_error([b + sum(of) for b, of in zip(before, steps, strict=True)]),
        }
    figures["stages"] = {
        stage: mean_and_error([seed.pool["spent"][stage]["cpu_seconds"] for seed in seeds])
        for stage in {"dpo": ("labels",), "rlhf": ("labels", "reward_model"), "rl": ()}[method]
    }
    figures["collapsed"] = sum(why is not None for seed in seeds for why in seed.collapsed(method))
    figures["runs"] = sum(len(seed.runs[method]) for seed in seeds)
    common = [seed.to_common() for seed in seeds]
    known = method in ("dpo", "rlhf") and all(of_seed is not None for of_seed in common)
    figures["to_common"] = {
        name: mean_and_error([of_seed[method][name] for of_seed in common if of_seed])
        for name in (*CLOCKS, "generated_tokens", "kl", "gain")
    } if known else None  # fmt: skip
    if memory:
        figures["peak_bytes"] = mean_and_error([cell["peak_bytes"] for cell in memory])
        figures["models"] = max(cell["models"] for cell in memory)
        figures["settings"] = memory[0]["settings"]
    return figures


def _claims(seeds: Sequence[Seed], levels: Mapping[str, Any], memory: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The claims on DPO against the pipeline of reward model and RL."""

    def differences(figure: Any) -> list[float]:
        return [figure(seed, "rlhf") - figure(seed, "dpo") for seed in seeds]

    dpo, rlhf = (memory[method] for method in ("dpo", "rlhf"))

    def fewer(what: str, count: Any) -> dict[str, Any]:
        return decide(what, [count(a) - count(b) for a, b in zip(rlhf, dpo, strict=True)], exact=True)

    common = [seed.to_common() for seed in seeds]
    seconds = [c["rlhf"]["cpu_seconds"] - c["dpo"]["cpu_seconds"] for c in common if c]
    cheaper = [
        decide("peak memory saved", [(a["peak_bytes"] - b["peak_bytes"]) / 1e6 for a, b in zip(rlhf, dpo, strict=True)],
               unit="MB"),
        decide("CPU saved in a run of all steps", differences(_cpu_of_run), unit="s"),
    ]  # fmt: skip
    if len(seconds) == len(seeds):
        cheaper.insert(0, decide("CPU saved until the common reward", seconds, unit="s"))
    return [
        claim(
            "DPO is simpler",
            [
                fewer("training stages saved", lambda cell: len(cell["settings"])),
                fewer("models in memory saved", lambda cell: cell["models"]),
                fewer("settings saved", lambda cell: sum(map(len, cell["settings"].values()))),
            ],
        ),
        claim(
            "DPO is more stable",
            [
                decide("collapsed runs fewer", differences(lambda seed, m: _share(seed.collapsed(m))), unit="of all"),
                decide("spread of gain − β·KL over learning rates less", differences(lambda seed, m: seed.spread(m))),
            ],
        ),
        claim("DPO is cheaper", cheaper),
        claim(
            "DPO is as good or better at equal divergence",
            [
                decide(
                    f"reward more at {kl:g} nats",
                    [a - b for a, b in zip(levels["dpo"][at], levels["rlhf"][at], strict=True)],
                )
                for at, kl in enumerate(LEVELS)
            ],
        ),
    ]


def _cpu_of_run(seed: Seed, method: str) -> float:
    of_runs = [run["points"][-1]["cpu_seconds"] for run in seed.runs[method]]
    return seed.before(method)["cpu_seconds"] + statistics.fmean(of_runs)


def _share(reasons: Sequence[str | None]) -> float:
    return sum(why is not None for why in reasons) / len(reasons)


def label(method: str) -> str:
    """The method's name for people."""
    return "best of N by the reward model" if method == BEST_OF_N else LABELS[method]
