"""tokenize_preferences: preference rows -> token ids of the shared prompt and of each response, as a Dataset.

encode_pairs.py encodes a row. datasets.map reads and writes in batches: memory does not grow with the data, mapped
pages are released, and a second call finds the result in datasets' cache.

(The module is not named `tokenize`: with this folder on sys.path that would hide the standard library's module.)
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import transformers
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from dpofast.common.printable import printable
from dpofast.data import columns as row_columns
from dpofast.data import encode_pairs, formats, lists
from dpofast.data.arrow import cache_options, check_values, is_cached, mapped_files, release_pages, uncached_options
from dpofast.data.chat import render, train_tokens
from dpofast.data.encode_pairs import TRUNCATION_MODES, EncodedRow, RowEncoder
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
    BadRow,
    DataError,
)
from dpofast.data.images import decode, prompt_images, turns
from dpofast.data.images import tokens as image_tokens
from dpofast.data.images.columns import FEATURES, IMAGES, OF_IMAGES, ROW_IMAGES, STORED
from dpofast.data.images.prompt_images import PromptImages
from dpofast.data.images.stored import stored as stored_row
from dpofast.data.images.tokens import PLACE, files_digest, media_columns, with_images, with_stored_images
from dpofast.data.lists import check_list_options, check_pairs_can_be_made, lists_to_pairs
from dpofast.data.report import DataReport, NoUsableRow, bad_rows

# Columns that load_preferences adds: the number of a row's line, its file where there are several, and why that row
# cannot be used: the reason that rows are counted by, and the whole message.
LINE, FILE, ERROR, DETAIL = "_line", "_file", "_error", "_detail"
_ADDED = (LINE, FILE, ERROR, DETAIL)
_TRUNCATED, _CUT, _DROPPED, _REPEATED = "_truncated", "_cut", "_dropped", "_repeated"
_WORKING_COLUMNS = [ERROR, DETAIL, _TRUNCATED, _CUT, _DROPPED, _REPEATED]
_WITH_IMAGES = 64  # rows encoded together where images may stand beside them
# Formats in which a dataset shows the values that are stored, and no others.
_PLAIN_FORMATS = {None, "python", "arrow", "numpy", "torch", "tensorflow", "jax", "pandas", "polars"}
# datasets caches the result of map by a fingerprint of the encoder; this hash makes it change with the code.
_CODE = hashlib.sha256(
    b"".join(
        Path(str(module.__file__)).read_bytes()
        for module in (formats, row_columns, lists, encode_pairs, render, train_tokens)
        + (decode, prompt_images, turns, image_tokens)
    )
    + Path(__file__).read_bytes()
    + transformers.__version__.encode()
).hexdigest()


@dataclass(frozen=True, kw_only=True)
class _Encoder:
    """The function given to datasets.map, which hashes its fields into the fingerprint of the cached result.

    Bad rows become rows of nulls with the reason. `exact` names the columns whose nulls are the data's own, not
    Arrow's; `transform` is the dataset's (Dataset.set_transform); `image_files` is a hash of the image files' stamps.
    """

    rows: RowEncoder
    transform: Callable[[dict[str, Any]], Mapping[str, Sequence[Any]]] | None
    exact: tuple[str, ...]
    unit: str
    files: tuple[str, ...]
    image_files: str
    code: str = _CODE

    @property
    def has_images(self) -> bool:
        """Whether rows may have images."""
        return IMAGES in self.rows.columns

    @property
    def features(self) -> Features:
        ids, weights, number = List(Value("int32")), List(Value("float32")), Value("float32")
        given = self.rows.columns
        kinds: dict[str, Any] = {}
        if self.rows.is_list:
            kinds |= {LIST_ID_COLUMNS[0]: ids, LIST_ID_COLUMNS[1]: List(ids), RANK_COLUMN: ids, ORDER_COLUMN: ids}
            kinds |= {column: weights for column in (SCORE_COLUMN, LIST_REF_COLUMN) if column in given}
            kinds |= {LIST_WEIGHT_COLUMN: List(weights)}
        else:
            kinds |= dict.fromkeys(ID_COLUMNS, ids)
            kinds |= {column: number for column in REF_COLUMNS if column in given}
            kinds |= dict.fromkeys(WEIGHT_COLUMNS, weights)
        kinds |= {column: number for column in ROW_COLUMNS if column in given}
        if self.has_images:
            kinds |= {**FEATURES, PLACE: Value("int64")} | ({IMAGES: STORED} if self.transform else {})
        kinds |= {"row": Value("int64"), ERROR: Value("string"), DETAIL: Value("string")}
        kinds |= {_TRUNCATED: Value("int32"), _CUT: Value("int8")}
        return Features(kinds | {_DROPPED: Value("string"), _REPEATED: Value("string")})

    def __call__(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        numbers = batch[LINE] if self.unit == "line" else indices
        shown = transformed(self.transform, lambda: batch) if self.transform else batch
        encoded: dict[str, list[Any]] = {name: [] for name in self.features}
        for i, number in enumerate(numbers):
            where = formats.place(self.unit, number)
            if FILE in batch and batch[FILE][i] is not None:
                line = f", {formats.place('line', batch[LINE][i])}" if LINE in batch else ""
                where += f", {batch[FILE][i]}{line}"
            try:
                if ERROR in batch and batch[ERROR][i] is not None:
                    detail = batch[DETAIL][i].removeprefix(batch[ERROR][i]).removeprefix(": ")
                    raise BadRow(batch[ERROR][i], detail)
                example = self._encode({column: _of_row(shown, column, i) for column in self.rows.columns})
            except BadRow as problem:
                if problem.fatal:
                    raise DataError(f"{where}: {problem}") from None
                example = {ERROR: problem.reason, DETAIL: f"{where}: {problem}"}
            example |= {"row": number, PLACE: indices[i]}
            for name, values in encoded.items():
                values.append(example.get(name))
        release_pages(self.files)
        return encoded

    def _encode(self, row: Mapping[str, Any]) -> dict[str, Any]:
        row = {name: value if name in self.exact else formats.without_nulls(value) for name, value in row.items()}
        encoded = self.rows.encode(row)
        example = _of_list(encoded, row) if self.rows.is_list else _of_pair(encoded, row)
        example |= {column: row[column] for column in ROW_COLUMNS if column in self.rows.columns}
        example |= media_columns(encoded.media) | {IMAGES: row.get(IMAGES)}
        example |= {_TRUNCATED: encoded.truncated, _CUT: encoded.cut_prompt}
        return example | {_DROPPED: encoded.dropped, _REPEATED: encoded.repeated}


def _of_row(shown: Mapping[str, Sequence[Any]], column: str, index: int) -> Any:
    """A value of a row; of images, in the form that is stored, whichever of its columns they are in."""
    if column != IMAGES:
        return shown[column][index]
    return stored_row(next(shown[name] for name in ROW_IMAGES if name in shown)[index])


def _of_pair(encoded: EncodedRow, row: Mapping[str, Any]) -> dict[str, Any]:
    example = dict(zip(ID_COLUMNS, (encoded.prompt, *encoded.responses), strict=True))
    example |= {column: row[column] for column in REF_COLUMNS if column in row}
    return example | dict(zip(WEIGHT_COLUMNS, encoded.weights, strict=True))


def _of_list(encoded: EncodedRow, row: Mapping[str, Any]) -> dict[str, Any]:
    ranking = encoded.ranking
    assert ranking is not None
    example = dict(zip(LIST_ID_COLUMNS, (encoded.prompt, encoded.responses), strict=True))
    example |= {RANK_COLUMN: ranking.ranks, ORDER_COLUMN: ranking.order, SCORE_COLUMN: ranking.scores}
    if LIST_REF_COLUMN in row:
        example[LIST_REF_COLUMN] = [row[LIST_REF_COLUMN][place] for place in ranking.order]
    if any(weights is not None for weights in encoded.weights):
        pairs = zip(encoded.weights, encoded.responses, strict=True)
        example[LIST_WEIGHT_COLUMN] = [[1.0] * len(ids) if weights is None else weights for weights, ids in pairs]
    return example


def transformed(transform: Callable[[dict[str, Any]], Any], read: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Return what a dataset's transform shows of the batch of stored rows that `read` returns.

    Raises:
        DataError: they cannot be read (datasets decodes images); it raises, or returns no columns of as many rows.
    """
    try:
        batch = read()
        stored = {name: list(batch[name]) for name in batch if name not in _ADDED}
    except Exception as error:
        raise DataError(
            f"rows cannot be read for the dataset's transform: {type(error).__name__}: {error}; where that is of an "
            "image, cast its column to datasets.Image(decode=False) and open it in the transform"
        ) from error
    count = len(next(iter(stored.values())))
    try:
        shown = dict(transform(stored))
        lengths = {name: len(values) for name, values in shown.items()}
    except Exception as error:
        raise DataError(f"the dataset's transform failed: {type(error).__name__}: {error}") from error
    if set(lengths.values()) != {count}:
        raise DataError(f"the dataset's transform: expected {count} rows in every column, got {lengths}")
    return shown


@dataclass(frozen=True, kw_only=True)
class _GoodRows:
    """The function given to a second datasets.map, which drops bad rows, and the columns of `dropped`."""

    files: tuple[str, ...]
    dropped: tuple[str, ...]
    code: str = _CODE

    def __call__(self, table: pa.Table) -> pa.Table:
        good = table.filter(table.column(ERROR).is_null()).drop_columns(list(self.dropped))
        release_pages(self.files)
        return good


def tokenize_preferences(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    max_length: int | None = 1024,
    truncation_mode: str = "keep_start",
    on_bad_row: str = "raise",
    list_pairs: str | None = None,
    min_score_gap: float | None = None,
    assistant_only_loss: bool = True,
    source: str | None = None,
    vocab_size: int | None = None,
    images: PromptImages | None = None,
    num_proc: int | None = None,
) -> tuple[Dataset, DataReport]:
    """Turn preference data (the formats of dpofast.data.formats) into token ids.

    A row is bad if a column is missing, null or of the wrong type, a response or the prompt is empty, chosen equals
    rejected, a text of it would be left out, written twice or trained on as another's, the prompt alone fills
    max_length, a number is not finite or out of its range, a token id is out of range, or a response has no token that
    counts. A list is bad too if it has one response, ranks that contradict its scores, equal responses of different
    ranks, or one rank for all.

    Args:
        dataset: the result of load_preferences, or any Dataset in one of the formats. Its transform (set_transform) is
            applied, once; columns that its format hides (set_format) are not read.
        tokenizer: tokenizes text with its special tokens, or renders conversations. May be None for token ids.
        max_length: most tokens of prompt + response. Reference log-probs in the data are not changed, so they must have
            been computed with the same max_length. None: no limit.
        truncation_mode: "keep_start" cuts longer responses at their end; "keep_end" cuts the start of the prompt so
            that the pair's longer response fits, alike for both, which share it.
        on_bad_row: "raise" an error that counts all bad rows and names the first five, or "skip" and count them.
        list_pairs: what becomes of lists. None: they stay lists. "all": every two responses of different ranks become a
            pair; "best_worst": the first and the last; "adjacent": neighbours in the order from best to worst, where
            their ranks differ. A list that gives no pair is counted in the report.
        min_score_gap: with list_pairs, the least difference of the scores of a pair, which are float32: one that equals
            it but for their rounding counts.
        assistant_only_loss: in a response of several turns only the assistant's are trained. A turn's own key `train`,
            true or false, is stronger. Off: all turns without that key are.
        source: name of the data in messages; None: the name that load_preferences stored.
        vocab_size: if given, token ids must be below it.
        images: of a vision-language model, PromptImages(processor, vision_inputs(model)): with it rows may have images,
            and conversations are written by the processor's chat template; tokenizer is then the processor's.
        num_proc: number of worker processes.

    Returns:
        A Dataset and a DataReport. Of pairs, the dataset has prompt_ids, chosen_ids, rejected_ids (lists of int32), row
        (int64: the row's number in the source) and, where they are given, ref_chosen_logps and ref_rejected_logps
        (float32, nats), weight, margin, beta, label_smoothing (float32), and, where they are given or made of turns,
        chosen_weights and rejected_weights (lists of float32, one for each token; null: all 1); with `images`,
        where rows may have some, the columns of dpofast.data.images.columns. Of lists, in place of chosen_ids and
        rejected_ids: responses_ids (K lists, from best to worst), ranks (K int32 from 0, dense, equal where tied),
        order (K int32: places in the row of the source), and, where they are given, scores and ref_responses_logps (K
        float32) and responses_weights.

    Raises:
        DataError: bad rows with on_bad_row="raise", no usable row, a missing column, a transform that fails, damaged
            Arrow files, a tokenizer without an EOS token or chat template, list_pairs for rows that are pairs, or
            min_score_gap for lists without scores.
        ValueError: an option out of range.
        TypeError: dataset or tokenizer has another type.
    """
    _check_options(dataset, tokenizer, max_length, truncation_mode, vocab_size)
    check_on_bad_row(on_bad_row)
    check_list_options(list_pairs, min_score_gap)
    source = source or dataset.info.dataset_name or "<dataset>"
    if len(dataset) == 0:
        raise DataError(f"{source}: there are no rows")
    if not is_cached(dataset):
        check_values(dataset, source)
    try:
        stored, transform = _view(dataset)
        stored = stored if transform else with_stored_images(stored)
        names = transformed(transform, lambda: stored[:1]) if transform else stored.column_names
        columns = formats.used_columns([name for name in names if name not in _ADDED])
        check_pairs_can_be_made(columns, list_pairs, min_score_gap)
    except (BadRow, DataError) as problem:
        raise DataError(f"{source}: {problem}") from None
    columns = tuple(IMAGES if name in ROW_IMAGES else name for name in columns)
    has_images = IMAGES in columns
    encoder = _Encoder(
        rows=RowEncoder(
            tokenizer=tokenizer if images is None else images.tokenizer,
            columns=columns,
            max_length=max_length,
            truncation_mode=truncation_mode,
            assistant_only_loss=assistant_only_loss,
            vocab_size=vocab_size,
            images=images,
        ),
        transform=transform,
        exact=(*(name for name, feature in stored.features.items() if "Json" in str(feature)), IMAGES),
        unit="line" if LINE in stored.column_names and FILE not in stored.column_names else "row",
        files=mapped_files(dataset),
        image_files="" if transform or not has_images else files_digest(stored),
    )
    rows_together = _WITH_IMAGES if has_images else 1000
    # which files the images of a transform are in is not known before, nor whether these have changed
    options = uncached_options(stored) if transform and has_images else cache_options(stored, encoder)
    try:
        encoded = stored.map(
            encoder,
            batched=True,
            with_indices=True,
            batch_size=rows_together,
            writer_batch_size=rows_together if transform else 1000,
            remove_columns=stored.column_names,
            features=encoder.features,
            num_proc=num_proc,
            desc=printable(f"Tokenizing {source}"),
            **options,
        )
    except DataError as error:
        raise DataError(f"{source}, {error}") from None
    # Counted from the result rather than during map, so that a result from the cache is counted too.
    table = encoded.data.table
    if on_bad_row == "raise" and table.column(ERROR).null_count < table.num_rows:
        raise bad_rows(source, table.num_rows, table.column(DETAIL).drop_null().to_pylist()) from None
    report = _report(table, source, encoder.unit, "lists" if encoder.rows.is_list else "pairs")
    if report.kept == 0:
        raise NoUsableRow(report)
    _check_repeated(table, source, report.kept, is_list=encoder.rows.is_list)
    if report.shortened_prompts:
        warnings.warn(
            f"{printable(source)}: {report.shortened_prompts:,} prompts end in tokens that differ in front of a "
            f"response and are left out there (first of all {printable(report.dropped)}): the model is trained on a "
            "prompt that is not quite the one it sees later; use a template that writes both alike, or end prompts at "
            "a word",
            stacklevel=1,
        )
    files = mapped_files(encoded)
    release_pages(files)
    weights = [column for column in (*WEIGHT_COLUMNS, LIST_WEIGHT_COLUMN) if column in encoded.column_names]
    unused = weights if all(table.column(column).null_count == table.num_rows for column in weights) else []
    dropped = [*_WORKING_COLUMNS, *unused]
    if not report.skipped:
        good = encoded.remove_columns(dropped)
    else:
        # Written to a new table instead of selected by index, so that later readers get contiguous rows.
        kept = {name: feature for name, feature in encoded.features.items() if name not in dropped}
        good = encoded.with_format("arrow").map(
            _GoodRows(files=files, dropped=tuple(dropped)),
            batched=True,
            batch_size=rows_together if transform else 1000,
            features=Features(kept),
            desc=printable(f"Leaving out bad rows of {source}"),
        )
        good = good.with_format(None)
    if list_pairs is not None:
        good, report = lists_to_pairs(good, list_pairs, min_score_gap, report)
    if has_images and images is None:  # a row with some would have been refused
        good = good.remove_columns([name for name in (PLACE, IMAGES, *OF_IMAGES) if name in good.column_names])
    elif has_images:
        good = good.remove_columns([PLACE]) if transform else with_images(good, stored)
    return good, report


def _check_repeated(table: pa.Table, source: str, kept: int, *, is_list: bool) -> None:
    """Raise DataError where the responses of most rows begin with the prompt: in few rows that is chance."""
    repeated = table.column(_REPEATED).drop_null()
    if 2 * len(repeated) > kept:
        which = "all" if is_list else "both"
        raise DataError(
            f"{source}: {which} responses repeat the prompt in {len(repeated):,} of {kept:,} rows, and it would be "
            f"trained on as their text; leave the column `prompt` out (what {which} begin with is the prompt then), or "
            f"cut it off from the responses. The first: {repeated[0].as_py()}"
        )


def _view(dataset: Dataset) -> tuple[Dataset, Callable[[dict[str, Any]], Any] | None]:
    """Return the rows that a dataset stores, without the columns that its format hides, and its transform or None.

    Raises:
        DataError: a formatter that is not one of datasets' own.
    """
    view = dataset.format
    transform = view["format_kwargs"].get("transform") if view["type"] == "custom" else None
    if transform is None and view["type"] not in _PLAIN_FORMATS:
        raise DataError(
            f"the dataset's format {view['type']!r} is not one of datasets' own, and shows rows that are not stored: "
            "apply it with map, or with_format(None)"
        )
    hidden = (
        [] if view["output_all_columns"] else [name for name in dataset.column_names if name not in view["columns"]]
    )
    hidden = [name for name in hidden if name not in _ADDED]
    stored = dataset.with_format(None)
    return stored.remove_columns(hidden) if hidden else stored, transform


def _check_options(
    dataset: Any, tokenizer: Any, max_length: int | None, truncation_mode: str, vocab_size: int | None
) -> None:
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"dataset: expected a datasets.Dataset, got {type(dataset).__name__}; choose one split of a DatasetDict,"
            " save an IterableDataset to a file"
        )
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"tokenizer: expected a transformers tokenizer or None, got {type(tokenizer).__name__}; of a processor,"
            " pass its .tokenizer"
        )
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length: expected None or at least 2 (a prompt and a response token), got {max_length}")
    if truncation_mode not in TRUNCATION_MODES:
        raise ValueError(f"truncation_mode: expected 'keep_start' or 'keep_end', got {truncation_mode!r}")
    if vocab_size is not None and vocab_size < 1:
        raise ValueError(f"vocab_size: expected None or a positive number, got {vocab_size}")


def check_on_bad_row(on_bad_row: str) -> None:
    """Raise ValueError unless on_bad_row is "raise" or "skip"."""
    if on_bad_row not in ("raise", "skip"):
        raise ValueError(f"on_bad_row: expected 'raise' or 'skip', got {on_bad_row!r}")


def _report(table: pa.Table, source: str, unit: str, holds: str) -> DataReport:
    bad = table.select([ERROR, "row"]).filter(table.column(ERROR).is_valid())
    rows_by_reason: dict[str, list[int]] = {}
    for reason, row in zip(bad.column(ERROR).to_pylist(), bad.column("row").to_pylist(), strict=True):
        rows_by_reason.setdefault(reason, []).append(row)
    return DataReport.from_bad_rows(
        source,
        unit,
        table.num_rows,
        rows_by_reason,
        truncated=pc.sum(table.column(_TRUNCATED)).as_py() or 0,
        cut_prompts=pc.sum(table.column(_CUT)).as_py() or 0,
        dropped=table.column(_DROPPED).drop_null().to_pylist(),
        holds=holds,
    )
