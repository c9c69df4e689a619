"""DataReport: how many rows of a source were kept, skipped and cut, with the rows and reasons of the skipped ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from dpofast.common.printable import printable
from dpofast.data.formats import DataError

_REPORTED_ROWS = 10
_SHOWN_ROWS = 5


class Skipped(NamedTuple):
    """Rows skipped for one reason: how many, and the numbers of the first ten."""

    total: int
    rows: tuple[int, ...]

    def plus(self, later: Skipped) -> Skipped:
        """Those of both, for the same reason."""
        return Skipped(self.total + later.total, (self.rows + later.rows)[:_REPORTED_ROWS])


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """Counts of kept, skipped and truncated rows. Rows are numbered by `unit`: "line" from 1, or "row" from 0."""

    source: str
    unit: str
    rows: int
    kept: int
    skipped: Mapping[str, Skipped]
    # Responses (not rows) truncated to max_length, without their EOS.
    truncated: int
    # Rows whose prompt lost its beginning to max_length (truncation_mode keep_end).
    cut_prompts: int = 0
    # Rows whose prompt is tokenized differently at its end when a response follows; the differing tokens are dropped.
    shortened_prompts: int
    # The first of them, quoted: what was dropped.
    dropped: str = ""
    # What a row is: "pairs" or "lists".
    holds: str = "pairs"
    # Pairs that lists were turned into, 0 where they were not.
    pairs_of_lists: int = 0

    @property
    def examples(self) -> int:
        """Rows of the token-level dataset: the pairs that lists were turned into, else the rows that were kept."""
        return self.pairs_of_lists or self.kept

    @property
    def example_kind(self) -> str:
        """What these are: "pairs" or "lists"."""
        return "pairs" if self.pairs_of_lists else self.holds

    @staticmethod
    def from_bad_rows(
        source: str,
        unit: str,
        rows: int,
        bad: Mapping[str, Sequence[int]],
        *,
        truncated: int = 0,
        cut_prompts: int = 0,
        dropped: Sequence[str] = (),
        holds: str = "pairs",
    ) -> DataReport:
        """Build the report of a source with `rows` rows; `bad` holds the numbers of skipped rows by reason."""
        return DataReport(
            source=source,
            unit=unit,
            rows=rows,
            kept=rows - sum(map(len, bad.values())),
            skipped={reason: Skipped(len(numbers), tuple(numbers[:_REPORTED_ROWS])) for reason, numbers in bad.items()},
            truncated=truncated,
            cut_prompts=cut_prompts,
            shortened_prompts=len(dropped),
            dropped=repr(dropped[0]) if dropped else "",
            holds=holds,
        )

    def as_pairs(self, pairs: int, without: Sequence[int], reason: str) -> DataReport:
        """Return the report of lists that were turned into so many pairs; those `without` a pair count as skipped."""
        skipped = {**self.skipped}
        if without:
            skipped[reason] = Skipped(len(without), tuple(without[:_REPORTED_ROWS]))
        return replace(self, skipped=skipped, kept=self.kept - len(without), pairs_of_lists=pairs)

    def summary(self) -> str:
        """Return one line, and one more for each reason to skip rows."""
        parts = [f"{self.source}: {self.kept:,} of {self.rows:,} {self.holds} kept"]
        if self.pairs_of_lists:
            parts.append(f"as {self.pairs_of_lists:,} pairs")
        if self.truncated:
            parts.append(f"responses cut to max_length, their end and EOS gone: {self.truncated:,}")
        if self.cut_prompts:
            parts.append(f"prompts cut to max_length, their beginning gone: {self.cut_prompts:,}")
        if self.shortened_prompts:
            parts.append(
                f"prompts whose last tokens differ in front of a response: {self.shortened_prompts:,} (left out there, "
                f"first of all: {self.dropped})"
            )
        lines = [", ".join(parts)]
        for reason, (total, rows) in self.skipped.items():
            numbers = ", ".join(map(str, rows)) + (", ..." if total > len(rows) else "")
            lines.append(f"  skipped {total:,}: {reason} ({self.unit} {numbers})")
        return printable("\n".join(lines))


class NoUsableRow(DataError):
    """Data without a usable row; the message lists the reasons with their counts.

    Attributes:
        report: of all rows.
    """

    def __init__(self, report: DataReport) -> None:
        """Keep the report, which a stream adds to those of its other rows."""
        super().__init__(f"{report.source}: no row can be used\n{report.summary()}")
        self.report = report


def bad_rows(source: str, rows: int, details: Sequence[str]) -> DataError:
    """Return the DataError for bad rows, of which `details` says the places and reasons: all counted, five shown."""
    if len(details) == 1:
        return DataError(f"{source}, {details[0]}")
    shown = "".join(f"\n  {detail}" for detail in details[:_SHOWN_ROWS])
    more = f"\n  and {len(details) - _SHOWN_ROWS:,} more" if len(details) > _SHOWN_ROWS else ""
    way = "on_bad_row 'skip' counts them and leaves them out"
    return DataError(f"{source}: {len(details):,} of {rows:,} rows cannot be used ({way}):{shown}{more}")
