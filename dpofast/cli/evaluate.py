"""`dpofast eval`: accuracy and margins of a checkpoint's implicit reward, and how they depend on response length.

The implicit reward of a response is beta · (policy − reference log-prob); with --no_reference, beta · policy log-prob.
dpofast.evaluation.statistics defines the intervals and the length-balanced accuracy.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from dpofast.cli.arguments import parse, quiet
from dpofast.cli.scored_pairs import ScoringArguments, prepare, scored
from dpofast.data.lists import check_list_options
from dpofast.evaluation.pair_records import PairTable
from dpofast.evaluation.statistics import Estimate, LengthStatistics, length_statistics, mean, share
from dpofast.losses.config import PreferenceLoss
from dpofast.losses.functional import preference_loss
from dpofast.losses.own_kinds import import_from


@dataclass(kw_only=True)
class EvalArguments(ScoringArguments):
    """Options of `dpofast eval`."""

    loss_type: str = field(
        default="sigmoid",
        metadata={"help": "The loss to report: a kind of dpofast train's, or module:function, one of your own."},
    )
    output: str = field(default="table", metadata={"help": "What is printed: table or json."})
    list_pairs: str | None = field(
        default=None, metadata={"help": "As in training: turns lists into pairs, by all, best_worst or adjacent."}
    )
    min_score_gap: float | None = field(
        default=None, metadata={"help": "With list_pairs: the least difference of the scores of a pair."}
    )

    def __post_init__(self) -> None:
        """Check what is cheap to check."""
        super().__post_init__()
        check_list_options(self.list_pairs, self.min_score_gap)
        if self.output not in ("table", "json"):
            raise ValueError(f"output: expected 'table' or 'json', got {self.output!r}")
        try:
            loss = PreferenceLoss(kind=self.loss_type, beta=self.beta)
        except ValueError as error:
            raise ValueError(f"--loss_type and --beta: {error}") from error
        if loss.needs_reference and self.no_reference:
            raise ValueError(
                f"loss_type: {self.loss_type!r} has a reference; beside --no_reference name one that has none: simpo, "
                "orpo, cpo or sft"
            )

    @property
    def data_options(self) -> dict[str, Any]:
        """The options of tokenize_preferences."""
        return {**super().data_options, "list_pairs": self.list_pairs, "min_score_gap": self.min_score_gap}


def main(argv: Sequence[str]) -> int:
    """Evaluate, print, and return 0.

    Raises:
        ValueError: an option, a model or data that cannot be used.
    """
    import_from(os.getcwd())  # --loss_type module:function
    arguments, _ = parse((EvalArguments,), argv, prog="dpofast eval", description=__doc__)
    quiet(sys.stderr.isatty())
    prepared = prepare(arguments)
    pairs = _table(scored(arguments, prepared), arguments)
    figures, length = evaluation(pairs)
    ties = int((pairs.margins == 0).sum())
    if arguments.output == "json":
        print(_json(arguments, figures, length, prepared.report, ties))
    else:
        print(prepared.report.summary())
        _show(arguments, figures, length, ties)
    return 0


def _table(rows: Iterable[Mapping[str, Any]], arguments: EvalArguments) -> PairTable:
    """The numbers of all rows, 64 bytes a pair, by row number."""
    reference = ("ref_chosen_logps", "ref_rejected_logps")
    names = ("row", "chosen_logps", "rejected_logps", "chosen_tokens", "rejected_tokens")
    values = np.array([[row[name] for name in names] + [row.get(name, 0.0) for name in reference] for row in rows])
    values = values[values[:, 0].argsort()]
    logps, lengths, ref = values[:, 1:3], values[:, 3:5], values[:, 5:7]
    output = preference_loss(
        torch.from_numpy(logps.ravel().copy()),
        torch.arange(2 * len(values)).view(-1, 2),
        torch.from_numpy(ref.ravel().copy()),
        loss=PreferenceLoss(kind=arguments.loss_type, beta=arguments.beta),
        lengths=torch.from_numpy(lengths.ravel().copy()),
    )
    return PairTable(
        rows=values[:, 0].astype(np.int64),
        rewards=output.rewards.view(-1, 2).numpy(),
        logps=logps,
        lengths=lengths.astype(np.int64),
        losses=output.losses.numpy(),
    )


def evaluation(pairs: PairTable) -> tuple[dict[str, Estimate], LengthStatistics]:
    """Returns the reported estimates by name, and the statistics of reward and length."""
    length = length_statistics(pairs)
    balanced = Estimate(
        length.accuracy_balanced,
        *length.accuracy_balanced_interval,
        length.accuracy_chosen_longer.count + length.accuracy_chosen_shorter.count,
    )
    figures = {
        "accuracy": share(pairs.margins > 0),
        "ties": share(pairs.margins == 0),
        "margin": mean(pairs.margins),
        "loss": mean(pairs.losses),
        "reward, chosen": mean(pairs.rewards[:, 0]),
        "reward, rejected": mean(pairs.rewards[:, 1]),
        "chosen below reference": share(pairs.rewards[:, 0] < 0),
        "accuracy, chosen longer": length.accuracy_chosen_longer,
        "accuracy, chosen shorter": length.accuracy_chosen_shorter,
        "accuracy, length-balanced": balanced,
        "longer response preferred": length.longer_preferred,
    }
    return figures, length


def _lengths(pairs_length: LengthStatistics) -> dict[str, float]:
    return {
        "chosen_is_longer": pairs_length.chosen_longer,
        "preferred_tokens": pairs_length.preferred_length,
        "margin_length_correlation": pairs_length.margin_correlation,
    }


def _json(
    arguments: EvalArguments, figures: dict[str, Estimate], length: LengthStatistics, report: Any, ties: int
) -> str:
    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: finite(part) for name, part in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    named = {name.replace(", ", "_").replace("-", "_").replace(" ", "_"): asdict(e) for name, e in figures.items()}
    if arguments.no_reference:
        del named["chosen_below_reference"]
    data = {
        "source": report.source,
        "rows": report.rows,
        "pairs": report.examples,
        "truncated": report.truncated,
        "ties": ties,
    }
    return json.dumps(
        finite({"settings": asdict(arguments), "data": data, "metrics": named, "length": _lengths(length)}), indent=2
    )


def _show(arguments: EvalArguments, figures: dict[str, Estimate], length: LengthStatistics, ties: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "value", "95 % interval", "pairs")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, estimate in figures.items():
        left_out = (name == "ties" and not ties) or (arguments.no_reference and name == "chosen below reference")
        if not math.isnan(estimate.value) and not left_out:
            form = "{:+.3f}" if "margin" in name or "reward" in name.split(",") else "{:.3f}"
            bounds = (estimate.low, estimate.high)
            interval = "-" if math.isnan(estimate.low) else " to ".join(form.format(bound) for bound in bounds)
            table.add_row(name, form.format(estimate.value), interval, f"{estimate.count:,}")
    Console().print(table)
    count = figures["margin"].count
    if ties:
        why = ": is --ref_model the model itself?" if ties == count and not arguments.no_reference else "."
        print(f"In {ties:,} of {count:,} pairs the two rewards tie, which is not accurate{why}")
    if count == 1:
        print("A mean over one pair has no interval.")
    shares = _lengths(length)
    if math.isnan(shares["chosen_is_longer"]):
        return  # all pairs are of equal lengths
    correlation = shares["margin_length_correlation"]
    follows = "" if math.isnan(correlation) else f"; correlation of margin and length difference {correlation:+.2f}"
    # print, because rich would break long lines
    print(
        f"The chosen response is the longer one in {shares['chosen_is_longer']:.0%} of the pairs of unequal lengths; "
        f"the preferred response has {shares['preferred_tokens']:.1f} tokens on average{follows}."
    )
    if shares["chosen_is_longer"] in (0, 1):
        missing = "longer" if shares["chosen_is_longer"] == 0 else "shorter"
        print(
            f"No pair's chosen response is the {missing} one, so accuracy cannot be told from a preference for length."
        )
