"""The closed form: DPO on enough pairs finds π*(y|x) ∝ π_ref(y|x)·exp(r*(x,y)/β), and with it the reward.

Claimed (arXiv 2305.18290, sections 4 and 5): the optimum of DPO's loss is the optimum of reward maximization under a KL
penalty, and β·log(π/π_ref) is then the reward, but for a constant of each prompt.

Computed: policies over all 32,768 responses of 5 symbols out of 8, for 3 prompts with rewards of their own
(enumerable.py), so that π*, every KL divergence and every correlation is a sum over all responses. Pairs are drawn from
π_ref and labelled by Bradley-Terry. Log-probs of policy and reference are dpofast.linear_logprobs', the loss is
dpofast.preference_loss, float64, minimized over all pairs at once until its slope is gone. What is left is the sampling
floor: no training on these pairs gets a smaller loss. Statistics says what it must be for many pairs, tr(F·H⁻¹)/(2n)
nats (information.py).

Flipped labels: a share ε of the labels is turned round, which makes P(y ≻ y') = (1−ε)σ(Δ) + ε·σ(−Δ) = p̃(Δ), Δ being the
true margin. A policy that can do anything then ends at these margins:
  plain DPO           logit p̃(Δ): too small, and never beyond logit(1−ε);
  cDPO (smoothing ε)  logit((1−ε)p̃ + ε(1−p̃)): smaller still, since smoothing turns labels round a second time;
  robust              Δ: its loss is the clean loss in expectation (arXiv 2403.00409), at more variance.
So cDPO is no correction: smoothing ε on clean labels ends where plain DPO on flipped labels does.

    python -m bench.paper.closed_form [--quick] [--work FOLDER]

draws closed_form.png, prints tables and appends to bench/results/paper.jsonl. Quick: 1,296 responses, fewer pairs.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

import dpofast
from bench.paper.closed_form_figure import draw
from bench.paper.closed_form_fit import SLOPE, figures
from bench.paper.enumerable import Space, World, random_world, sample_pairs
from bench.paper.experiment import SEEDS, begin, cells, mean_and_error, record
from bench.paper.information import predicted_kl
from bench.paper.text_table import plus_minus, text_table

FLIPPED, FLIPPED_BETA = 0.2, 1.0
LOSSES = {
    "plain": dpofast.PreferenceLoss(beta=FLIPPED_BETA),
    "cdpo": dpofast.PreferenceLoss(beta=FLIPPED_BETA, label_smoothing=FLIPPED),
    "robust": dpofast.PreferenceLoss(kind="robust", beta=FLIPPED_BETA, label_smoothing=FLIPPED),
}
# Pairs a free parameter from which on samples are large.
LARGE = 40


@dataclass(frozen=True)
class Size:
    """pairs: of a prompt; draws: of pairs, for the prediction."""

    space: Space
    pairs: tuple[int, ...]
    betas: tuple[float, ...]
    draws: int

    @property
    def large(self) -> tuple[int, ...]:
        """Where statistics for many pairs holds, and the robust loss has a minimum: it is not bounded below."""
        return tuple(pairs for pairs in self.pairs if pairs >= LARGE * self.space.free_parameters)


FULL = Size(Space(3, 8, 5), (1_000, 10_000, 100_000, 1_000_000), (0.05, 0.2, 1.0, 5.0), 100_000)
QUICK = Size(Space(2, 6, 4), (1_000, 10_000, 100_000), (0.2, 1.0), 20_000)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not there yet, draw, print and record. Returns 0."""
    args, size = begin("closed_form", __doc__, argv, FULL, QUICK)
    world = random_world(size.space, seed=0)

    def compute(name: str) -> dict[str, Any]:
        return _compute(world, size, name)

    names = [f"prediction-{beta}" for beta in size.betas]
    names += [f"clean-{beta}-{pairs}-{seed}" for beta in size.betas for pairs in size.pairs for seed in SEEDS]
    names += [f"flipped-{kind}-{pairs}-{seed}" for kind in LOSSES for pairs in size.large for seed in SEEDS]
    settings = {**asdict(size), "flipped": FLIPPED, "flipped_beta": FLIPPED_BETA, "slope": SLOPE}
    found = cells(args, settings, names, compute)
    clean = {str(beta): _clean(found, size, beta) for beta in size.betas}
    flipped = {kind: _over_pairs(found, size.large, f"flipped-{kind}") for kind in LOSSES}
    draw(args.pictures / "closed_form.png", size.pairs, size.large, clean, flipped, _shown(found, size), FLIPPED)
    _print(size, clean, flipped)
    seconds = sum(cell["seconds"] for cell in found.values())
    summary = {"settings": settings, "seeds": list(SEEDS), "clean": clean, "flipped": flipped, "seconds": seconds}
    record(args, "closed_form", summary)
    return 0


def _compute(world: World, size: Size, name: str) -> dict[str, Any]:
    kind, what, *rest = name.split("-")
    if kind == "prediction":
        return {"kl_times_pairs": predicted_kl(world, float(what), draws=size.draws)}
    pairs, seed = (int(value) for value in rest)
    if kind == "clean":
        return figures(world, sample_pairs(world, pairs, seed=seed), dpofast.PreferenceLoss(beta=float(what)))
    return figures(world, sample_pairs(world, pairs, seed=seed, flipped=FLIPPED), LOSSES[what])


def _over_pairs(found: dict[str, Any], counts: Sequence[int], prefix: str) -> dict[str, Any]:
    """(mean, standard error) over seeds of every number, for each count of pairs; and of the binned margins."""
    summary: dict[str, Any] = {}
    for pairs in counts:
        runs = [found[f"{prefix}-{pairs}-{seed}"] for seed in SEEDS]
        numbers = [name for name, value in runs[0].items() if isinstance(value, (int, float)) and name != "seconds"]
        summary[str(pairs)] = {name: mean_and_error([run[name] for run in runs]) for name in numbers}
        bins = zip(*(run["binned_margins"] for run in runs), strict=True)
        summary[str(pairs)]["binned_margins"] = [mean_and_error(values) for values in bins]
    return summary


def _clean(found: dict[str, Any], size: Size, beta: float) -> dict[str, Any]:
    """The same for a β without flips, with what statistics predicts and the rate: d log KL / d log pairs."""
    rates = []
    for seed in SEEDS:
        points = [(math.log(pairs), math.log(found[f"clean-{beta}-{pairs}-{seed}"]["kl"])) for pairs in size.large]
        x, y = torch.tensor(points, dtype=torch.float64).T
        rates.append((((x - x.mean()) * y).sum() / (x - x.mean()).square().sum()).item())
    return {
        "pairs": _over_pairs(found, size.pairs, f"clean-{beta}"),
        "predicted_kl_times_pairs": found[f"prediction-{beta}"]["kl_times_pairs"],
        "rate": mean_and_error(rates),
    }


def _shown(found: dict[str, Any], size: Size) -> dict[str, Any]:
    """Points (true, implicit reward) of some responses, of the first seed, for a middle β and two counts of pairs."""
    beta = size.betas[len(size.betas) // 2 - 1]
    counts = size.pairs[1], size.pairs[-1]
    return {"beta": beta, "points": {count: found[f"clean-{beta}-{count}-{SEEDS[0]}"]["rewards"] for count in counts}}


def _columns(found: dict[str, Any]) -> list[str]:
    """KL, what the correlation lacks to 1, and the slope."""
    correlation, error = found["correlation"]
    return [plus_minus(found["kl"]), plus_minus((1 - correlation, error)), plus_minus(found["regression"])]


def _print(size: Size, clean: dict[str, Any], flipped: dict[str, Any]) -> None:
    rows = []
    for beta, found in clean.items():
        for pairs, of in found["pairs"].items():
            predicted = found["predicted_kl_times_pairs"] / int(pairs)
            values = _columns(of)
            rows.append(
                [beta, f"{of['kl_reference'][0]:.3g}", f"{int(pairs):,}", values[0], f"{predicted:.3g}", *values[1:]]
            )
    table = text_table(
        f"Clean labels; {size.space.responses:,} responses, {size.space.free_parameters} parameters a prompt",
        ["β", "KL(π*‖π_ref)", "pairs a prompt", "KL(π_θ‖π*)", "predicted", "1 − r", "slope on r*"],
        rows,
    )
    print(table)
    for beta, found in clean.items():
        print(f"β = {beta}: KL falls like pairs^({plus_minus(found['rate'])}) from {LARGE} pairs a parameter on")
    rows = [[kind, f"{int(pairs):,}", *_columns(of)] for kind, found in flipped.items() for pairs, of in found.items()]
    table = text_table(
        f"{FLIPPED:.0%} of the labels flipped, β = {FLIPPED_BETA:g}",
        ["loss", "pairs a prompt", "KL(π_θ‖π*)", "1 − r", "slope on r*"],
        rows,
    )
    print(table)


if __name__ == "__main__":
    sys.exit(main())
