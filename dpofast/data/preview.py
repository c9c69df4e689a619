"""preview_preferences: rows as they will be trained on, as text: prompt and responses apart, special tokens visible."""

from __future__ import annotations

from collections.abc import Sequence

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from dpofast.common.printable import printable
from dpofast.data.formats import ID_COLUMNS, place
from dpofast.data.tokenize_pairs import FILE, LINE, tokenize_preferences

_INDENT = " " * 12


def preview_preferences(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase | None,
    rows: int = 3,
    *,
    max_length: int | None = 1024,
    truncation_mode: str = "keep_start",
    on_bad_row: str = "raise",
) -> str:
    """Return the first rows of a dataset as text, decoded from the token ids that training reads.

    Special tokens are shown, and control characters are escaped; a line end is escaped and begins a line here too.
    Token ids without a tokenizer are shown as numbers.

    Args:
        dataset: as for tokenize_preferences, like every argument but `rows`.
        tokenizer: the model's, or None for token ids.
        rows: how many rows to read; bad ones among them are named instead.
        max_length: as in training.
        truncation_mode: as in training.
        on_bad_row: "raise" or "skip".

    Raises:
        ValueError: rows below 1, or what tokenize_preferences raises.
    """
    if rows < 1:
        raise ValueError(f"rows: expected 1 or more to show, got {rows}")
    shown = dataset.select(range(min(rows, len(dataset)))) if isinstance(dataset, Dataset) else dataset
    tokens, report = tokenize_preferences(
        shown, tokenizer, max_length=max_length, truncation_mode=truncation_mode, on_bad_row=on_bad_row
    )
    unit = "line" if LINE in dataset.column_names and FILE not in dataset.column_names else "row"
    parts = []
    for row in tokens.with_format(None):
        counts = ", ".join(f"{name.removesuffix('_ids')} {len(row[name]):,}" for name in ID_COLUMNS)
        lines = [f"{place(unit, row['row'])}, tokens: {counts}"]
        lines += [f"  {name.removesuffix('_ids'):<10}{_visible(tokenizer, row[name])}" for name in ID_COLUMNS]
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, report.summary()])


def _visible(tokenizer: PreTrainedTokenizerBase | None, ids: Sequence[int]) -> str:
    """The text of token ids, or the ids without a tokenizer."""
    if tokenizer is None:
        return " ".join(map(str, ids))
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    broken = f"\n{_INDENT}"
    return printable(text).replace("\t", "\\t").replace("\n", f"\\n{broken}").removesuffix(broken)
