"""Tokenizes the datasets of a run and keeps their reports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import Dataset, IterableDataset

from dpofast.data.images.stored import dataset_of, undecoded
from dpofast.data.load import tokenize_preferences
from dpofast.data.token_rows import has_reference
from dpofast.training.checks.columns import check_column_names, check_column_values, is_list_data
from dpofast.training.checks.images import columns_with_images, has_images, shown_columns
from dpofast.training.config import DPOConfig
from dpofast.training.processing import WITHOUT_IMAGES, Processing


class PreferenceData:
    """Tokenizes the datasets of a run.

    Args:
        args: the trainer's.
        processing: what rows are read with.
        vocab_size: of the policy, an upper bound of token ids.

    Attributes:
        reports: the DataReport of every dataset by its name ("train", "eval").
        images: makes the pixels of rows with images; None where the run can use none.
    """

    def __init__(self, args: DPOConfig, processing: Processing, vocab_size: int) -> None:
        """Keep the options of tokenize_preferences."""
        self.reports: dict[str, Any] = {}
        self.images, self._refused = processing.images, processing.refused
        asked = args.precompute_ref_log_probs and not args.chose_precompute
        self._loss = args.preference_loss()
        self._precompute_is_asked = asked and self._loss.needs_reference
        self._options = {
            "tokenizer": processing.tokenizer,
            "max_length": args.max_length,
            "truncation_mode": args.truncation_mode,
            "on_bad_row": args.on_bad_row,
            "list_pairs": args.list_pairs,
            "min_score_gap": args.min_score_gap,
            "assistant_only_loss": args.assistant_only_loss,
            "num_proc": args.dataset_num_proc,
            "vocab_size": vocab_size,
        }

    def tokenized(self, dataset: Dataset | IterableDataset, name: str, *, first_row: int = 0) -> Dataset:
        """Returns the token-level dataset; one that is streamed is read to its end.

        Args:
            dataset: preference pairs in any format.
            name: of the dataset, in messages and reports.
            first_row: the number of its first row in a stream, for messages.

        Raises:
            ValueError: no datasets.Dataset, rows that cannot be used (DataError), images that the run cannot use, or
                columns that the loss does not take; a stream, where precomputed reference log-probs are asked for and
                not just the default.
        """
        if isinstance(dataset, IterableDataset):
            if self._precompute_is_asked and not streams_reference(dataset):
                raise no_precomputed_stream()
            stream = undecoded(dataset)
            dataset = dataset_of(stream, stream.features)
        if not isinstance(dataset, Dataset):
            raise ValueError(f"{name}_dataset: expected a datasets.Dataset, got {type(dataset).__name__}")
        source = dataset.info.dataset_name or f"{name} data"
        source += f" from row {first_row} on" if first_row else ""
        check_column_names(dataset.column_names, self._loss, source, list_pairs=self._options["list_pairs"])
        options = self._options | self._image_options(dataset, source)
        if name != "train" and not is_list_data(dataset.column_names):  # pairs may be held out of lists that train
            options = {**options, "list_pairs": None, "min_score_gap": None}
        tokens, report = tokenize_preferences(dataset, source=source, **options)
        check_column_names(tokens.column_names, self._loss, source)
        check_column_values(tokens, self._loss, source, unit=report.unit)
        self.reports[name] = report
        return tokens

    def _image_options(self, dataset: Dataset, source: str) -> dict[str, Any]:
        """Of tokenize_preferences, for data with columns of images."""
        columns = columns_with_images(shown_columns(dataset))
        if columns and self._refused is not None and has_images(dataset):
            raise ValueError(f"{source}: it has images: {self._refused}. {WITHOUT_IMAGES}")
        return {"images": self.images} if columns and self.images is not None else {}


def streams_reference(dataset: IterableDataset) -> bool:
    """Whether a stream's columns are known and have the reference log-probs."""
    return has_reference(dataset.column_names)


def no_precomputed_stream() -> ValueError:
    """The refusal of precompute_ref_log_probs=True for a stream, in TRL's words."""
    return ValueError(
        "precompute_ref_log_probs=True is not supported with IterableDataset, whose rows come once: leave it out (for "
        "training data the reference is then in the step, evaluation data are read to their end), bring the columns "
        "ref_chosen_logps and ref_rejected_logps, or save the data to a file"
    )


def each_eval_dataset(prepare: Callable[[Dataset, str], Dataset], dataset: Any) -> Any:
    """Returns the prepared eval_dataset: a dataset, a dict of several (named "eval <key>"), or None."""
    if isinstance(dataset, dict):
        return {name: prepare(part, f"eval {name}") for name, part in dataset.items()}
    return None if dataset is None else prepare(dataset, "eval")
