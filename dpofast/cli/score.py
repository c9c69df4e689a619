"""`dpofast score`: add log-probs and implicit rewards to every row of a preference file.

Columns that are added: chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps (trl's names; nats, summed
over the response), chosen_tokens, rejected_tokens, chosen_rewards, rejected_rewards (beta times policy minus reference)
and margins. Of lists: responses_logps, ref_responses_logps, responses_tokens and responses_rewards, in the order of the
row's responses, and margins of the best and the worst. The output appears complete or not at all. A killed run leaves
its scores in OUTPUT.partial, and the same command resumes from it.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset

from dpofast.cli.arguments import parse, quiet
from dpofast.cli.load_models import base_of, device, is_adapter
from dpofast.cli.scored_pairs import Prepared, ScoringArguments, load, prepare, scored
from dpofast.common.locks import WriteLock
from dpofast.common.printable import printable
from dpofast.common.ranks import Ranks
from dpofast.data.token_rows import has_lists, weight_columns
from dpofast.scoring.responses import check_ld_alpha
from dpofast.scoring.score_file import (
    PartialScores,
    SourceRows,
    check_output,
    source_rows,
    source_snapshot,
    weights_of,
    write_scored,
)
from dpofast.training.checks.columns import is_list_data
from dpofast.training.parallel.commands import by_the_first, launched, with_the_others


@dataclass(kw_only=True)
class ScoreArguments(ScoringArguments):
    """Options of `dpofast score`."""

    output: str = field(metadata={"help": "The file to write: .jsonl or .parquet."})
    overwrite: bool = field(default=False, metadata={"help": "Write over an output that exists."})
    ld_alpha: float | None = field(
        default=None,
        metadata={"help": "Weight in [0, 1] of tokens beyond the length of the shorter response (LD-DPO)."},
    )

    def __post_init__(self) -> None:
        """Check what is cheap to check."""
        super().__post_init__()
        path = Path(self.output)
        if path.suffix not in (".jsonl", ".parquet"):
            raise ValueError(f"output: expected a file that ends in .jsonl or .parquet, got {self.output!r}")
        self.check_output()
        if Path(self.data).exists() and path.resolve() == Path(self.data).resolve():
            raise ValueError("output: expected another file than --data")
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"ld_alpha: expected a number in [0, 1], got {self.ld_alpha}")

    def check_output(self) -> None:
        """Refuse an output that exists."""
        path = Path(self.output)
        if path.exists() and (path.is_dir() or not self.overwrite):
            way = "name a file" if path.is_dir() else "name another, or pass --overwrite"
            raise ValueError(f"output: {path} exists already: {way}")


def main(argv: Sequence[str]) -> int:
    """Score, and return 0.

    Raises:
        ValueError: an option, a model or data that cannot be used, a partial file of another run, or an output that
            another process writes.
        OSError: the output cannot be written (a full disk).
    """
    with launched(device()) as ranks:
        arguments, source, prepared = with_the_others(ranks, lambda: _prepare(argv, ranks))
        unit, total = _unit(prepared.tokens), len(prepared.tokens)
        output = Path(arguments.output)
        partial = PartialScores(output.with_name(output.name + ".partial"), _identity(arguments, prepared))
        with contextlib.ExitStack() as held:
            start = by_the_first(ranks, lambda: _begin(arguments, partial, held))
            if start and ranks.process == 0:
                print(printable(f"going on with {partial.path}: {start:,} of {total:,} {unit} are scored already"))
            with _explained(output, partial):
                for rows in scored(arguments, prepared, ranks, start=start, ld_alpha=arguments.ld_alpha):
                    by_the_first(ranks, functools.partial(partial.append, rows))
                by_the_first(ranks, lambda: write_scored(output, source, partial))
        if ranks.process == 0:
            print(prepared.report.summary())
            print(printable(f"{total:,} scored {unit} are in {output}"))
    return 0


def _prepare(argv: Sequence[str], ranks: Ranks) -> tuple[ScoreArguments, SourceRows, Prepared]:
    arguments, _ = parse((ScoreArguments,), argv, prog="dpofast score", description=__doc__)
    quiet(sys.stderr.isatty() and ranks.process == 0)
    snapshot = source_snapshot(arguments.data, arguments.split)
    dataset = load(arguments)
    source = source_rows(arguments.data, dataset, snapshot)
    check_output(Path(arguments.output), source)
    names = dataset.column_names
    check_ld_alpha(arguments.ld_alpha, is_list=is_list_data(names), weighted=bool(weight_columns(names)))
    prepared = prepare(arguments, dataset, ranks)
    weighted = bool(weight_columns(prepared.tokens.column_names))  # of turns that do not all count
    check_ld_alpha(arguments.ld_alpha, is_list=False, weighted=weighted)
    return arguments, source, prepared


def _identity(arguments: ScoreArguments, prepared: Prepared) -> dict[str, Any]:
    """What decides the numbers: a partial file of other options, weights or data must not be gone on with."""
    left_out = ("output", "overwrite", *(() if arguments.fsdp else ("fsdp",)))
    return {
        **{name: value for name, value in asdict(arguments).items() if name not in left_out},
        "weights": weights_of(arguments.model),
        "base_weights": weights_of(base_of(arguments.model) if is_adapter(arguments.model) else None),
        "ref_weights": weights_of(arguments.ref_model),
        "tokens": prepared.tokens._fingerprint,
        "order": "of prompts",
    }


def _begin(arguments: ScoreArguments, partial: PartialScores, held: contextlib.ExitStack) -> int:
    """Lock the output until `held` is left, and return how many rows are scored already."""
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    held.enter_context(WriteLock(output, output.with_name(f".{output.name}.lock")))
    arguments.check_output()  # another run may have written it since the first look
    return partial.resume(overwrite=arguments.overwrite)


@contextlib.contextmanager
def _explained(output: Path, partial: PartialScores) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"output: {output} cannot be written: {error.strerror or error}; what is scored so far is in "
            f"{partial.path}, and the same command goes on with it"
        ) from error


def _unit(tokens: Dataset) -> str:
    return "lists" if has_lists(tokens.column_names) else "pairs"
