"""preview_preferences: rows as they will be trained on, as text: prompt and responses apart, special tokens visible."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from dpofast.common.printable import printable
from dpofast.data.formats import (
    ID_COLUMNS,
    LIST_ID_COLUMNS,
    LIST_REF_COLUMN,
    LIST_WEIGHT_COLUMN,
    ORDER_COLUMN,
    RANK_COLUMN,
    REF_COLUMNS,
    ROW_COLUMNS,
    SCORE_COLUMN,
    WEIGHT_COLUMNS,
    place,
)
from dpofast.data.images.columns import IMAGE_TOKENS, IMAGES
from dpofast.data.images.decode import opened
from dpofast.data.images.prompt_images import PromptImages
from dpofast.data.images.shown import text_of_prompt
from dpofast.data.tokenize_pairs import FILE, LINE, tokenize_preferences

_BREAK = "\n" + " " * 12


def preview_preferences(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase | None,
    rows: int = 3,
    *,
    max_length: int | None = 1024,
    truncation_mode: str = "keep_start",
    on_bad_row: str = "raise",
    list_pairs: str | None = None,
    min_score_gap: float | None = None,
    assistant_only_loss: bool = True,
    images: PromptImages | None = None,
) -> str:
    """Return the first rows of a dataset as text, decoded from the token ids that training reads.

    Special tokens are shown, and control characters are escaped; a line end is escaped and begins a line here too.
    Token ids without a tokenizer are shown as numbers. Tokens that do not count 1 stand as `[weight 0: ...]`; a list's
    responses from best to worst, each with its rank from 0, its score and its place in the row of the source. An image
    is `<image 1: 640x480, 300 tokens>` in place of its placeholders, a tile of one `<tile 1: 64 tokens>`.

    Args:
        dataset: as for tokenize_preferences, like every argument but `rows`.
        tokenizer: the model's, or None for token ids.
        rows: how many rows to read; bad ones among them are named instead.
        max_length: as in training.
        truncation_mode: as in training.
        on_bad_row: "raise" or "skip".
        list_pairs: as in training.
        min_score_gap: as in training.
        assistant_only_loss: as in training.
        images: as in tokenize_preferences; the text is then decoded by its tokenizer.

    Raises:
        ValueError: rows below 1, or what tokenize_preferences raises.
    """
    if rows < 1:
        raise ValueError(f"rows: expected 1 or more to show, got {rows}")
    tokenizer = tokenizer if images is None else images.tokenizer
    shown = dataset.select(range(min(rows, len(dataset)))) if isinstance(dataset, Dataset) else dataset
    tokens, report = tokenize_preferences(
        shown,
        tokenizer,
        max_length=max_length,
        truncation_mode=truncation_mode,
        on_bad_row=on_bad_row,
        list_pairs=list_pairs,
        min_score_gap=min_score_gap,
        assistant_only_loss=assistant_only_loss,
        images=images,
    )
    unit = "line" if LINE in dataset.column_names and FILE not in dataset.column_names else "row"
    parts = []
    for row in tokens.with_format(None):
        responses = list(_list_of(row) if LIST_ID_COLUMNS[1] in row else _pair_of(row))
        sizes = [("prompt", row[ID_COLUMNS[0]]), *((name, ids) for name, _, ids, _ in responses)]
        lines = [f"{place(unit, row['row'])}, tokens: {', '.join(f'{name} {len(ids):,}' for name, ids in sizes)}"]
        values = [f"{name} {row[name]:g}" for name in ROW_COLUMNS if name in row]
        lines += [f"  {', '.join(values)}"] if values else []
        sizes_of_images = _sizes(row)
        if len(sizes_of_images) != len(row.get(IMAGE_TOKENS) or ()):
            lines.append(f"  {'images':<10}{', '.join(sizes_of_images)}")
        lines.append(f"  {'prompt':<10}{_prompt(tokenizer, row, sizes_of_images)}")
        for name, said, ids, weights in responses:
            lines.append(f"  {name:<10}{said}{_weighted(tokenizer, ids, weights)}")
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, report.summary()])


# Of a response: its name, what is said of it, its ids, and its tokens' weights or None.
_Shown = tuple[str, str, Sequence[int], Sequence[float] | None]


def _pair_of(row: Mapping[str, Any]) -> Iterator[_Shown]:
    for name, logps, weights in zip(ID_COLUMNS[1:], REF_COLUMNS, WEIGHT_COLUMNS, strict=True):
        said = f"(reference {row[logps]:g}) " if logps in row else ""
        yield name.removesuffix("_ids"), said, row[name], row.get(weights)


def _list_of(row: Mapping[str, Any]) -> Iterator[_Shown]:
    numbers = ((RANK_COLUMN, "rank"), (SCORE_COLUMN, "score"), (LIST_REF_COLUMN, "reference"))
    for at, ids in enumerate(row[LIST_ID_COLUMNS[1]]):
        said = [f"{name} {row[column][at]:g}" for column, name in numbers if column in row]
        weights = row.get(LIST_WEIGHT_COLUMN)
        yield f"[{row[ORDER_COLUMN][at]}]", f"({', '.join(said)}) ", ids, weights and weights[at]


def _sizes(row: Mapping[str, Any]) -> list[str]:
    """Width and height of a row's images, in pixels."""
    return ["{}x{}".format(*opened(image).size) for image in row.get(IMAGES) or ()]


def _prompt(tokenizer: PreTrainedTokenizerBase | None, row: Mapping[str, Any], sizes: Sequence[str]) -> str:
    """The text of a row's prompt, with a mark for each of its images, or for each of their tiles."""
    tiled = len(sizes) != len(row.get(IMAGE_TOKENS) or ())

    def mark(image: int, tokens: int) -> str:
        if tiled:
            return f"<tile {image + 1}: {tokens:,} tokens>"
        return f"<image {image + 1}: {sizes[image]}, {tokens:,} tokens>"

    return text_of_prompt(row, row[ID_COLUMNS[0]], lambda ids: _visible(tokenizer, ids), mark)


def _weighted(tokenizer: PreTrainedTokenizerBase | None, ids: Sequence[int], weights: Sequence[float] | None) -> str:
    """The text of token ids, with the weights that are not 1."""
    if weights is None:
        return _visible(tokenizer, ids)
    shown = ""
    for weight, tokens in groupby(zip(weights, ids, strict=True), key=lambda token: token[0]):
        text = _visible(tokenizer, [token for _, token in tokens])
        text, ends = text if weight == 1 else f"[weight {weight:g}: {text}]", text.endswith("\\n")
        shown += text + (_BREAK if ends else " " if tokenizer is None else "")
    return shown.removesuffix(_BREAK).rstrip(" " if tokenizer is None else "")


def _visible(tokenizer: PreTrainedTokenizerBase | None, ids: Sequence[int]) -> str:
    """The text of token ids, or the ids without a tokenizer."""
    if tokenizer is None:
        return " ".join(map(str, ids))
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return printable(text).replace("\t", "\\t").replace("\n", f"\\n{_BREAK}").removesuffix(_BREAK)
