"""tokenize_preferences: preference rows -> token ids of the shared prompt and of each response.

    text            tokens(prompt), tokens(prompt + response + EOS)
    conversations   tokens(template(prompt)), tokens(template(prompt + response)); the template writes the end
    token ids       as given

The ids equal those of trl 1.16. The prompt is the token-level common prefix of the tokenized prompt and of both
tokenized prompt + response sequences, so that its forward pass can be shared by both responses. datasets.map reads and
writes in batches: memory does not grow with the data, mapped pages are released, and a second call finds the result in
datasets' cache.

(The module is not named `tokenize`: with this folder on sys.path that would hide the standard library's module.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pyarrow as pa
import pyarrow.compute as pc
import transformers
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from dpofast.data import formats
from dpofast.data.arrow import mapped_files, release_pages
from dpofast.data.formats import ID_COLUMNS, REF_COLUMNS, BadRow, DataError

# Columns that the JSONL reader adds: the line number of a row, and why that line cannot be used.
LINE, ERROR = "_line", "_error"
_TRUNCATED, _SHORTENED = "_truncated", "_shortened"
_WORKING_COLUMNS = [ERROR, _TRUNCATED, _SHORTENED]
_REPORTED_ROWS = 10
# datasets caches the result of map by a fingerprint of the encoder; this hash makes it change with the code.
_CODE = hashlib.sha256(
    b"".join(Path(file).read_bytes() for file in (__file__, formats.__file__)) + transformers.__version__.encode()
).hexdigest()


class Skipped(NamedTuple):
    """Rows skipped for one reason: how many, and the numbers of the first ten."""

    total: int
    rows: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """Counts of kept, skipped and truncated rows. Rows are numbered by `unit`: "line" from 1 (JSONL), "row" from 0."""

    source: str
    unit: str
    rows: int
    kept: int
    skipped: Mapping[str, Skipped]
    # Responses (not rows) truncated to max_length, without their EOS.
    truncated: int
    # Rows whose prompt is tokenized differently at its end when a response follows; the differing tokens are dropped.
    shortened_prompts: int

    @staticmethod
    def from_bad_rows(
        source: str,
        unit: str,
        rows: int,
        bad: Mapping[str, Sequence[int]],
        *,
        truncated: int = 0,
        shortened_prompts: int = 0,
    ) -> DataReport:
        """Build the report of a source with `rows` rows; `bad` holds the numbers of skipped rows by reason."""
        return DataReport(
            source=source,
            unit=unit,
            rows=rows,
            kept=rows - sum(map(len, bad.values())),
            skipped={reason: Skipped(len(numbers), tuple(numbers[:_REPORTED_ROWS])) for reason, numbers in bad.items()},
            truncated=truncated,
            shortened_prompts=shortened_prompts,
        )

    def summary(self) -> str:
        """Return one line, and one more for each reason to skip rows."""
        parts = [f"{self.source}: {self.kept:,} of {self.rows:,} pairs kept"]
        if self.truncated:
            parts.append(f"responses cut to max_length, their end and EOS gone: {self.truncated:,}")
        if self.shortened_prompts:
            parts.append(f"prompts whose last tokens differ in front of a response: {self.shortened_prompts:,}")
        lines = [", ".join(parts)]
        for reason, (total, rows) in self.skipped.items():
            numbers = ", ".join(map(str, rows)) + (", ..." if total > len(rows) else "")
            lines.append(f"  skipped {total:,}: {reason} ({self.unit} {numbers})")
        return "\n".join(lines)


def no_usable_row(report: DataReport) -> DataError:
    """Return the DataError for data without a usable row; its message lists the reasons with their counts."""
    return DataError(f"{report.source}: no row can be used\n{report.summary()}")


def _shared(ids: Sequence[int], others: Sequence[int]) -> int:
    """Length of the common prefix."""
    if others[: len(ids)] == ids:
        return len(ids)
    return next(i for i in range(len(ids)) if i >= len(others) or ids[i] != others[i])


@dataclass(frozen=True, kw_only=True)
class _Encoder:
    """The function given to datasets.map, which hashes its fields into the fingerprint of the cached result."""

    tokenizer: PreTrainedTokenizerBase | None
    columns: tuple[str, ...]
    max_length: int | None
    vocab_size: int | None
    skip: bool
    unit: str
    files: tuple[str, ...]
    code: str = _CODE

    @property
    def features(self) -> Features:
        kinds: dict[str, Any] = {column: List(Value("int32")) for column in ID_COLUMNS}
        kinds |= {column: Value("float32") for column in REF_COLUMNS if column in self.columns}
        kinds |= {"row": Value("int64"), ERROR: Value("string"), _TRUNCATED: Value("int8"), _SHORTENED: Value("int8")}
        return Features(kinds)

    def __call__(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        numbers = batch[LINE] if self.unit == "line" else indices
        encoded: dict[str, list[Any]] = {name: [] for name in self.features}
        for i, number in enumerate(numbers):
            try:
                if ERROR in batch and batch[ERROR][i] is not None:
                    raise BadRow(batch[ERROR][i])
                example = self._encode({column: batch[column][i] for column in self.columns})
            except BadRow as problem:
                if problem.fatal or not self.skip:
                    raise DataError(f"{formats.place(self.unit, number)}: {problem}") from None
                example = {ERROR: problem.reason}
            example["row"] = number
            for name, values in encoded.items():
                values.append(example.get(name))
        release_pages(self.files)
        return encoded

    def _encode(self, row: Mapping[str, Any]) -> dict[str, Any]:
        kinds = formats.row_kinds(row, self.columns)
        shortened = False
        if "prompt_ids" in kinds:
            prompt, chosen, rejected = (formats.token_ids(column, row[column]) for column in ID_COLUMNS)
        else:
            alone, *whole = self._tokenize(row, kinds)
            start = min(_shared(alone, ids) for ids in whole)
            shortened = start < len(alone)
            prompt, (chosen, rejected) = alone[:start], (ids[start:] for ids in whole)
        if not prompt:
            raise BadRow("the prompt is empty", "a response's first token is predicted from it: begin with a BOS token")
        for name, ids in (("chosen", chosen), ("rejected", rejected)):
            if not ids:
                raise BadRow(f"the {name} response is empty")
        if chosen == rejected:
            raise BadRow("chosen and rejected are equal")
        largest = max(map(max, (prompt, chosen, rejected)))
        if self.vocab_size is not None and largest >= self.vocab_size:
            raise BadRow(f"a token id is outside the vocabulary of {self.vocab_size}", f"got {largest}")
        truncated = 0
        if self.max_length is not None:
            room = self.max_length - len(prompt)
            if room <= 0:
                raise BadRow(
                    f"the prompt fills max_length={self.max_length}",
                    f"its {len(prompt)} tokens leave none for a response; raise max_length or shorten the prompt",
                )
            truncated = (len(chosen) > room) + (len(rejected) > room)
            chosen, rejected = chosen[:room], rejected[:room]
            if chosen == rejected:
                raise BadRow(f"chosen and rejected are equal within max_length={self.max_length}")
        example = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        example |= {column: row[column] for column in REF_COLUMNS if column in self.columns}
        return example | {_TRUNCATED: truncated, _SHORTENED: int(shortened)}

    def _tokenize(self, row: Mapping[str, Any], kinds: Mapping[str, str]) -> list[list[int]]:
        """Token ids of the prompt alone, and with each response."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise BadRow("text cannot be used without a tokenizer", "tokenizer is None", fatal=True)
        is_text = kinds["chosen"] == "text"
        if kinds.get("prompt") == kinds["chosen"]:
            prompt, *responses = (row[column] for column in ("prompt", "chosen", "rejected"))
        else:
            prompt, *responses = formats.split_prompt(row["chosen"], row["rejected"])
        for name, response in zip(("chosen", "rejected"), responses, strict=True):
            # A turn may hold tool calls or reasoning instead of content.
            if not (response if is_text else any(m[key] for m in response for key in m if key != "role")):
                raise BadRow(f"the {name} response is empty")
        if is_text:
            eos = tokenizer.eos_token
            if not eos:
                raise BadRow("the tokenizer has no eos_token", "text responses end with it; set it", fatal=True)
            # One text per call: a batched call was no faster, since the tokenizer's own work dominates.
            texts = [prompt, *(prompt + text + ("" if text.endswith(eos) else eos) for text in responses)]
            return [tokenizer(text)["input_ids"] for text in texts]
        if not prompt:
            raise BadRow("the prompt is empty", "the two conversations share no first turn")
        options = {"tools": formats.template_value("tools", row.get("tools"))}
        options |= row.get("chat_template_kwargs") or {}
        options |= {"tokenize": True, "return_dict": True}
        try:
            alone = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)["input_ids"]
            whole = [tokenizer.apply_chat_template(prompt + response, **options)["input_ids"] for response in responses]
        # Errors that a template raises itself, and errors of its expressions on unexpected values.
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            if not getattr(tokenizer, "chat_template", None):
                detail = "conversations are written by it; set it"
                raise BadRow("the tokenizer has no chat_template", detail, fatal=True) from None
            raise BadRow("the chat template refused the conversation", str(error)) from None
        return [alone, *whole]


@dataclass(frozen=True, kw_only=True)
class _GoodRows:
    """The function given to a second datasets.map, which drops bad rows."""

    files: tuple[str, ...]
    code: str = _CODE

    def __call__(self, table: pa.Table) -> pa.Table:
        good = table.filter(table.column(ERROR).is_null()).drop_columns(_WORKING_COLUMNS)
        release_pages(self.files)
        return good


def tokenize_preferences(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    max_length: int | None = 1024,
    truncation_mode: str = "keep_start",
    on_bad_row: str = "raise",
    source: str | None = None,
    vocab_size: int | None = None,
    num_proc: int | None = None,
) -> tuple[Dataset, DataReport]:
    """Turn preference data (the formats of dpofast.data.formats) into token ids.

    A row is bad if a column is missing, null or of the wrong type, a response or the prompt is empty, chosen equals
    rejected, the prompt alone fills max_length, a reference log-prob is not finite, or a token id is out of range.

    Args:
        dataset: the result of load_preferences, or any Dataset in one of the formats.
        tokenizer: tokenizes text with its special tokens, or renders conversations. May be None for token ids.
        max_length: most tokens of prompt + response; longer responses are truncated at the end. Reference log-probs in
            the data are not changed, so they must have been computed with the same max_length. None: no limit.
        truncation_mode: only "keep_start": with "keep_end" the two responses would no longer share their prompt.
        on_bad_row: "raise" at the first bad row, or "skip" and count bad rows.
        source: name of the data in messages; None: the name that load_preferences stored.
        vocab_size: if given, token ids must be below it.
        num_proc: number of worker processes.

    Returns:
        A Dataset with prompt_ids, chosen_ids, rejected_ids (lists of int32), row (int64: the row's number in the
        source) and, if given, ref_chosen_logps, ref_rejected_logps (float32, nats); and a DataReport.

    Raises:
        DataError: a bad row with on_bad_row="raise", no usable row, a missing column, or a tokenizer without an EOS
            token or chat template.
        ValueError: an option out of range.
        TypeError: dataset or tokenizer has another type.
    """
    _check_options(dataset, tokenizer, max_length, truncation_mode, vocab_size)
    check_on_bad_row(on_bad_row)
    source = source or dataset.info.dataset_name or "<dataset>"
    if len(dataset) == 0:
        raise DataError(f"{source}: there are no rows")
    try:
        columns = formats.used_columns(set(dataset.column_names) - {LINE, ERROR})
    except BadRow as problem:
        raise DataError(f"{source}: {problem}") from None
    encoder = _Encoder(
        tokenizer=tokenizer,
        columns=columns,
        max_length=max_length,
        vocab_size=vocab_size,
        skip=on_bad_row == "skip",
        unit="line" if LINE in dataset.column_names else "row",
        files=mapped_files(dataset),
    )
    try:
        encoded = dataset.with_format(None).map(
            encoder,
            batched=True,
            with_indices=True,
            remove_columns=dataset.column_names,
            features=encoder.features,
            num_proc=num_proc,
            desc=f"Tokenizing {source}",
        )
    except DataError as error:
        raise DataError(f"{source}, {error}") from None
    # Counted from the result rather than during map, so that a result from the cache is counted too.
    report = _report(encoded.data.table, source, encoder.unit)
    if report.kept == 0:
        raise no_usable_row(report)
    files = mapped_files(encoded)
    release_pages(files)
    if not report.skipped:
        return encoded.remove_columns(_WORKING_COLUMNS), report
    # Written to a new table instead of selected by index, so that later readers get contiguous rows.
    kept = {name: feature for name, feature in encoded.features.items() if name not in _WORKING_COLUMNS}
    good = encoded.with_format("arrow").map(
        _GoodRows(files=files), batched=True, features=Features(kept), desc=f"Leaving out bad rows of {source}"
    )
    return good.with_format(None), report


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
    if truncation_mode == "keep_end":
        raise ValueError(
            "truncation_mode: 'keep_end' would cut the two responses' prompts differently, and they could not share"
            " one; use 'keep_start' with a larger max_length, or shorten the prompts beforehand"
        )
    if truncation_mode != "keep_start":
        raise ValueError(f"truncation_mode: expected 'keep_start', got {truncation_mode!r}")
    if vocab_size is not None and vocab_size < 1:
        raise ValueError(f"vocab_size: expected None or a positive number, got {vocab_size}")


def check_on_bad_row(on_bad_row: str) -> None:
    """Raise ValueError unless on_bad_row is "raise" or "skip"."""
    if on_bad_row not in ("raise", "skip"):
        raise ValueError(f"on_bad_row: expected 'raise' or 'skip', got {on_bad_row!r}")


def _report(table: pa.Table, source: str, unit: str) -> DataReport:
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
        shortened_prompts=pc.sum(table.column(_SHORTENED)).as_py() or 0,
    )
