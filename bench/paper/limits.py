"""The limits of DPO: length bias and likelihood displacement, which losses avoid them, and whether the report warns.

A small Llama learns a language of 41 words (toy_language.py), and is then trained by dpofast.DPOTrainer on:
  longer  the chosen response is richer in words of the topic, and in 70 % of the pairs it is the longer one; both are
          far richer than the language, as answers of a better model are;
  alike   the two responses differ in one word;
  fair    the chosen response is richer, and length says nothing: the control.

Claimed: with summed log-probs the implicit reward follows length (arXiv 2403.19159), less so where tokens beyond the
shorter response count less (LD-DPO, arXiv 2409.06411) or where log-probs are compared per token (sigmoid_norm; SimPO,
arXiv 2405.14734). DPO makes chosen responses that are nearly the rejected ones less likely (arXiv 2402.13228,
2410.08847), and an NLL term (RPO) holds them. Each report.html must warn of what is the matter with its run, and of
nothing else.

Computed, on held-out pairs of the same set, of the rewards that the loss itself compares: Pearson's r of margin and
difference of lengths, accuracy where the chosen response is the longer one and where it is the shorter one; the share
of chosen responses that became less likely than under the reference; the mean length of what each policy then writes.

    python -m bench.paper.limits [--quick] [--work FOLDER]

draws limits.png, prints tables, appends to bench/results/paper.jsonl and leaves every run's report in FOLDER/reports.
Quick: fewer runs of one seed, and fewer reports.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from transformers import LlamaForCausalLM

from bench.paper import limits_data, toy_language
from bench.paper.experiment import SEEDS, begin, cells, mean_and_error, record
from bench.paper.limits_figure import draw
from bench.paper.limits_runs import CASES, PAIRS_PER_STEP, STEPS, figures
from bench.paper.text_table import plus_minus, text_table
from bench.paper.toy_language import trained_model, write


@dataclass(frozen=True)
class Size:
    """reported: the cases whose report.html is written; reference_steps: of the language model; held_out: pairs."""

    seeds: tuple[int, ...]
    cases: tuple[str, ...]
    reported: tuple[str, ...]
    reference_steps: int
    held_out: int


FULL = Size(SEEDS, tuple(CASES), tuple(CASES), 500, 1000)
QUICK = Size((0,), ("fair", "dpo", "ld_zero", "norm", "alike", "rpo"), ("dpo", "alike"), 500, 400)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not there yet, draw, print and record. Returns 0."""
    args, size = begin("limits", __doc__, argv, FULL, QUICK)

    @lru_cache(maxsize=1)
    def reference(seed: int) -> LlamaForCausalLM:
        return trained_model(steps=size.reference_steps, seed=seed)

    def compute(name: str) -> dict[str, Any]:
        case, seed = name.rsplit("-", 1)
        model = reference(int(seed))
        if case == "reference":
            return asdict(write(model, count=256, seed=int(seed)))
        report = args.work / "reports" / f"{name}.html" if case in size.reported else None
        return figures(model, CASES[case], held_out=size.held_out, seed=int(seed), report=report)

    names = [f"{case}-{seed}" for seed in size.seeds for case in ("reference", *size.cases)]
    settings = {
        "reference_steps": size.reference_steps,
        "held_out": size.held_out,
        "steps": STEPS,
        "pairs_per_step": PAIRS_PER_STEP,
        "cases": {name: asdict(case) for name, case in CASES.items()},
        "rates": [limits_data.FAIR, limits_data.LONGER],
        "chosen_longer": limits_data.CHOSEN_LONGER,
        "usual": toy_language.USUAL,
        "shortest": toy_language.SHORTEST,
        "longest": toy_language.LONGEST,
    }
    found = cells(args, settings, names, compute)
    summary = {
        case: _over_seeds([found[f"{case}-{seed}"] for seed in size.seeds]) for case in ("reference", *size.cases)
    }
    draw(args.pictures / "limits.png", summary)
    _print(summary, len(size.seeds))
    seconds = sum(cell["seconds"] for cell in found.values())
    record(args, "limits", {"settings": settings, "seeds": list(size.seeds), "cases": summary, "seconds": seconds})
    return 0


def _over_seeds(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """(mean, standard error) of every number, None where there is none; and how many runs have each warning."""
    counts = Counter(name for run in runs for name in run.get("warnings", ()))
    values = {
        name: None if value is None else mean_and_error([run[name] for run in runs])
        for name, value in runs[0].items()
        if name not in ("warnings", "seconds")
    }
    return {**values, "warnings": dict(counts)}


def _print(summary: dict[str, Any], seeds: int) -> None:
    for title, chosen, columns in (
        ("Length", ("fair", "longer"), ("r", "longer", "shorter", "gap", "length", "rate")),
        ("Displacement", ("alike",), ("displacement", "chosen", "rejected", "accuracy")),
    ):
        rows = [
            [
                CASES[case].label,
                *("-" if found[name] is None else plus_minus(found[name]) for name in columns),
                ", ".join(f"{name} ({count}/{seeds})" for name, count in found["warnings"].items()) or "none",
            ]
            for case, found in summary.items()
            if case in CASES and CASES[case].set in chosen
        ]
        print(text_table(title, ["run", *columns, "warnings"], rows))
    reference = summary["reference"]
    print(f"The reference writes {plus_minus(reference['length'])} words, rate {plus_minus(reference['rate'])}")
    if "simpo" in summary:
        print(f"SimPO's r before training: {plus_minus(summary['simpo']['r_before'])}")


if __name__ == "__main__":
    sys.exit(main())
