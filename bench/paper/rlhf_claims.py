"""The rule by which rlhf.py says whether a claim holds, and the claims' paragraphs.

A claim rests on findings: differences between the pipeline and DPO, one for each seed, signed so that more than 0 is in
DPO's favour. Their mean decides if it is more than two of its standard errors away from 0. A claim holds if a finding
is decided for it and none against it, does not hold if one is decided against it and none for it, and is otherwise not
decided here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.paper.experiment import mean_and_error

HOLDS, FAILS, OPEN = "holds", "does not hold", "not decided here"
STANDARD_ERRORS = 2.0


def decide(what: str, differences: Sequence[float], *, unit: str = "", exact: bool = False) -> dict[str, Any]:
    """A finding.

    Args:
        what: the difference that it is, in words.
        differences: one of each seed, more than 0 in the claim's favour. A single one has no standard error, and
            decides nothing.
        unit: of the differences.
        exact: they are counts, the same in every run: any difference decides.

    Returns:
        what, unit, difference: (mean, standard error), seeds: how many, verdict: HOLDS, FAILS or OPEN.
    """
    mean, error = mean_and_error(differences)
    decided = exact or len(differences) > 1
    if decided and mean > (0 if exact else STANDARD_ERRORS * error):
        verdict = HOLDS
    elif decided and mean < (0 if exact else -STANDARD_ERRORS * error):
        verdict = FAILS
    else:
        verdict = OPEN
    return {"what": what, "unit": unit, "difference": (mean, error), "seeds": len(differences), "verdict": verdict}


def combine(findings: Sequence[Mapping[str, Any]]) -> str:
    """The verdict on a claim that rests on findings."""
    verdicts = {finding["verdict"] for finding in findings}
    if (HOLDS in verdicts) == (FAILS in verdicts):
        return OPEN
    return HOLDS if HOLDS in verdicts else FAILS


def claim(text: str, findings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A claim, its findings and its verdict."""
    return {"claim": text, "verdict": combine(findings), "findings": list(findings)}


def paragraph(decided: Mapping[str, Any]) -> str:
    """A claim's paragraph: the verdict, then every finding with its figure and standard error."""
    told = [
        f"{finding['what']} {finding['difference'][0]:+,.3g}"
        + (f" ± {finding['difference'][1]:,.2g}" if finding["seeds"] > 1 else "")
        + (f" {finding['unit']}" if finding["unit"] else "")
        + f" ({finding['verdict']})"
        for finding in decided["findings"]
    ]
    return f"{decided['claim']}: {decided['verdict']}. " + "; ".join(told) + "."
