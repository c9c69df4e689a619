"""`dpofast eval`: accuracy and margins of a checkpoint's implicit reward, and how they depend on response length.

The implicit reward of a response is beta · (policy − reference log-prob); with --no_reference, beta · policy log-prob.
Of lists, accuracy is over all pairs of responses of different ranks, Kendall's tau, NDCG and the accuracy of the best
response come with it (dpofast.evaluation.list_metrics), and all else is of the best and the worst response.
dpofast.evaluation.statistics defines the intervals and the length-balanced accuracy.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from dpofast.cli.arguments import parse, quiet
from dpofast.cli.load_models import device
from dpofast.cli.scored_pairs import Prepared, ScoringArguments, load, prepare, scored
from dpofast.common.ranks import Ranks
from dpofast.data.lists import check_list_options
from dpofast.evaluation.pair_records import PairTable
from dpofast.evaluation.statistics import Estimate, LengthStatistics, length_statistics, mean, share
from dpofast.losses.config import PreferenceLoss
from dpofast.losses.own_kinds import import_from
from dpofast.scoring.score_table import score_table
from dpofast.training.checks.columns import check_column_names, check_column_values, is_list_data
from dpofast.training.parallel.commands import launched, with_the_others


@dataclass(kw_only=True)
class EvalArguments(ScoringArguments):
    """Options of `dpofast eval`."""

    loss_type: str | None = field(
        default=None,
        metadata={
            "help": "The loss to report: a kind of dpofast train's, or module:function, one of your own. Default: "
            "sigmoid, or of lists plackett_luce."
        },
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
        if self.loss_type is not None:
            self.loss(lists=False)

    def loss(self, *, lists: bool) -> PreferenceLoss:
        """The loss to report for pairs or lists.

        Raises:
            ValueError: --loss_type cannot be used, or the loss has a reference beside --no_reference.
        """
        kind = self.loss_type or ("plackett_luce" if lists else "sigmoid")
        try:
            loss = PreferenceLoss(kind=kind, beta=self.beta)
        except ValueError as error:
            raise ValueError(f"--loss_type: {error}") from error  # beta's range was checked before
        if loss.needs_reference and self.no_reference:
            raise ValueError(
                f"loss_type: {kind!r} has a reference; beside --no_reference name one that has none: simpo, "
                "orpo, cpo or sft" + (", with --list_pairs" if lists else "")
            )
        return loss

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
    with launched(device()) as ranks:
        arguments, loss, prepared = with_the_others(ranks, lambda: _prepare(argv, ranks))
        scores = [row for rows in scored(arguments, prepared, ranks) for row in rows]
        if ranks.process == 0:
            _report(arguments, loss, prepared, scores)
    return 0


def _prepare(argv: Sequence[str], ranks: Ranks) -> tuple[EvalArguments, PreferenceLoss, Prepared]:
    arguments, _ = parse((EvalArguments,), argv, prog="dpofast eval", description=__doc__)
    quiet(sys.stderr.isatty() and ranks.process == 0)
    dataset = load(arguments)
    loss = arguments.loss(lists=is_list_data(dataset.column_names) and arguments.list_pairs is None)
    check_column_names(dataset.column_names, loss, arguments.data, list_pairs=arguments.list_pairs)
    arguments.loss_type = loss.kinds[0]
    prepared = prepare(arguments, dataset, ranks)
    check_column_values(prepared.tokens, loss, arguments.data, unit=prepared.report.unit)
    return arguments, loss, prepared


def _report(
    arguments: EvalArguments, loss: PreferenceLoss, prepared: Prepared, scores: Sequence[dict[str, Any]]
) -> None:
    in_order = [scores[place] for place in np.argsort(prepared.order)]
    pairs = score_table(in_order, prepared.tokens, loss)
    figures, length = evaluation(pairs)
    ties, unit = int((pairs.margins == 0).sum()), "pairs" if pairs.lists is None else "lists"
    if arguments.output == "json":
        print(_json(arguments, figures, length, prepared.report, ties, unit=unit))
    else:
        print(prepared.report.summary())
        _show(arguments, figures, length, ties, unit=unit)


def evaluation(pairs: PairTable) -> tuple[dict[str, Estimate], LengthStatistics]:
    """Returns the reported estimates by name, and the statistics of reward and length."""
    length = length_statistics(pairs)
    balanced = Estimate(
        length.accuracy_balanced,
        *length.accuracy_balanced_interval,
        length.accuracy_chosen_longer.count + length.accuracy_chosen_shorter.count,
    )
    figures = {
        **_order(pairs),
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


def _order(pairs: PairTable) -> dict[str, Estimate]:
    """How well rewards order the responses."""
    if (lists := pairs.lists) is None:
        return {"accuracy": share(pairs.margins > 0), "ties": share(pairs.margins == 0)}
    known = ~np.isnan(lists.accuracy)  # not all responses are tied
    return {
        "accuracy": mean(lists.accuracy[known]),
        "ties": mean(lists.ties[known]),
        "accuracy, best over worst": share(pairs.margins > 0),
        "kendall tau": mean(lists.kendall_tau[known]),
        "ndcg": mean(lists.ndcg[known]),
        "best of k": share(lists.best_of_k[known] > 0),
    }


def _lengths(pairs_length: LengthStatistics) -> dict[str, float]:
    return {
        "chosen_is_longer": pairs_length.chosen_longer,
        "preferred_tokens": pairs_length.preferred_length,
        "margin_length_correlation": pairs_length.margin_correlation,
    }


def _json(
    arguments: EvalArguments,
    figures: dict[str, Estimate],
    length: LengthStatistics,
    report: Any,
    ties: int,
    *,
    unit: str,
) -> str:
    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: finite(part) for name, part in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    named = {name.replace(", ", "_").replace("-", "_").replace(" ", "_"): asdict(e) for name, e in figures.items()}
    if arguments.no_reference:
        del named["chosen_below_reference"]
    count = figures["margin"].count  # of lists, list_pairs may make several pairs
    data = {
        "source": report.source,
        "rows": report.rows,
        unit: count,
        "truncated": report.truncated,
        "ties": ties,
    }
    return json.dumps(
        finite({"settings": asdict(arguments), "data": data, "metrics": named, "length": _lengths(length)}), indent=2
    )


def _show(
    arguments: EvalArguments, figures: dict[str, Estimate], length: LengthStatistics, ties: int, *, unit: str
) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "value", "95 % interval", unit)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, estimate in figures.items():
        left_out = (name == "ties" and not estimate.value) or (
            arguments.no_reference and name == "chosen below reference"
        )
        if not math.isnan(estimate.value) and not left_out:
            form = "{:+.3f}" if "margin" in name or "reward" in name.split(",") else "{:.3f}"
            bounds = (estimate.low, estimate.high)
            interval = "-" if math.isnan(estimate.low) else " to ".join(form.format(bound) for bound in bounds)
            table.add_row(name, form.format(estimate.value), interval, f"{estimate.count:,}")
    Console().print(table)
    count = figures["margin"].count
    if ties:
        why = ": is --ref_model the model itself?" if ties == count and not arguments.no_reference else "."
        which = "the rewards of the best and the worst response" if unit == "lists" else "the two rewards"
        print(f"In {ties:,} of {count:,} {unit} {which} tie, which is not accurate{why}")
    if count == 1:
        print(f"A mean over one {unit[:-1]} has no interval.")
    shares = _lengths(length)
    if math.isnan(shares["chosen_is_longer"]):
        return  # all pairs are of equal lengths
    correlation = shares["margin_length_correlation"]
    follows = "" if math.isnan(correlation) else f"; correlation of margin and length difference {correlation:+.2f}"
    # print, because rich would break long lines
    chosen = "best" if unit == "lists" else "chosen"
    longer = f"The {chosen} response is the longer one in {shares['chosen_is_longer']:.0%} of the {unit}"
    tokens = f"{shares['preferred_tokens']:.1f} tokens on average"
    print(f"{longer} of unequal lengths; the preferred response has {tokens}{follows}.")
    if shares["chosen_is_longer"] in (0, 1):
        missing = "longer" if shares["chosen_is_longer"] == 0 else "shorter"
        print(
            f"No {unit[:-1]}'s {chosen} response is the {missing} one, so accuracy cannot be told from a preference "
            "for length."
        )
