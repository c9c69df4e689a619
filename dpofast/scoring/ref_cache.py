"""Computes a frozen reference's log-probs once, keeps them on disk, and adds them to the dataset as columns.

They are the same in every epoch and in every run over the same data, whatever its beta or loss: training needs no
second model in memory and no reference forward in a step, and a sweep computes them once. They are computed as the
policy's are (same packing, head and dtype), so that margins are 0 at step 0. Every token's log-prob is kept: another
ld_alpha is another sum and no new forward.

Rows are computed in the order of prompt_order, a window at a time, so that rows whose prompts begin alike share that
beginning wherever they stand in the dataset. Shards have rows in this order, which follows from the tokens, and with
them from the cache's key; the columns are in the dataset's order.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from dpofast._version import __version__
from dpofast.common.eval_mode import eval_mode
from dpofast.common.ranks import Ranks
from dpofast.data.arrow import chunk_bounds, read_chunks
from dpofast.data.formats import RANK_COLUMN
from dpofast.data.images.columns import IMAGES
from dpofast.data.token_rows import RowTokens, has_lists, reference_columns, token_columns, weight_columns
from dpofast.losses.sequences import pair_logprobs
from dpofast.model.attach import runs_padded, sequence_logprobs
from dpofast.packing.batch import PackedBatch
from dpofast.scoring.fingerprints import ResponseFingerprints, model_fingerprint
from dpofast.scoring.order import prompt_order
from dpofast.scoring.ref_store import Identity, ReferenceStore
from dpofast.scoring.responses import ResponseLogps, check_ld_alpha
from dpofast.scoring.score import WINDOW, Forward, Run, response_logps, run_batch
from dpofast.scoring.windows import rows_with_images, stored_images

# To be raised whenever log-probs may change (kernels, attention, numerics of the head), or which rows a shard has.
ENGINE_VERSION = 3

# The folder inside output_dir that holds the caches unless ref_cache_dir names another.
CACHE_FOLDER = "reference"
_ROWS = 4096  # looked at together


@torch.no_grad()
def reference_logps(
    model: Any, batch: PackedBatch, max_logits_bytes: int | None, ld_alpha: float | None = None
) -> Tensor:
    """Sequence log-probs (S,) float32, nats, without gradient, of a batch on the model's device.

    They are weighted by the batch's token weights, where it has some; with ld_alpha as in LD-DPO, of each pair, (P, 2).

    Raises:
        ValueError: ld_alpha with lists or token weights.
    """
    columns = batch.columns
    check_ld_alpha(ld_alpha, is_list=columns.lists is not None, weighted=columns.token_weights is not None)
    output = model(packed=batch, max_logits_bytes=max_logits_bytes)
    if ld_alpha is None:
        return sequence_logprobs(output, batch)
    return pair_logprobs(output.logps, batch.cu_targets, batch.pairs, ld_alpha=ld_alpha)


def add_reference_columns(
    dataset: Dataset,
    model: Any,
    forward: Forward,
    *,
    cache_dir: str | os.PathLike[str] | None,
    ld_alpha: float | None = None,
    description: str | None = None,
    ranks: Ranks | None = None,
    window: int = WINDOW,
) -> Dataset:
    """Add ref_chosen_logps and ref_rejected_logps (float32, nats, summed over the response) to a token-level dataset.

    To one of lists ref_responses_logps. Where the rows have weights of tokens, sums are of weight · log-prob; the cache
    holds what every token has without them, so that other weights, ranks or betas compute nothing again.

    What the cache holds is read, what it lacks is computed and stored, a window of rows at a time. It takes 64 bytes of
    memory a row while it runs, and 8 afterwards. Equal responses to equal prompts (of equal images, where they have
    some) get the same number in every row.

    A cache that cannot be written (a full disk, a read-only folder) is a warning: the results stay in memory and the
    run goes on, but a later run computes again what could not be stored.

    Args:
        dataset: with the columns prompt_ids, chosen_ids, rejected_ids, or prompt_ids, responses_ids, ranks; and those
            of images, where prompts have some.
        model: the reference with its log-prob head; a PEFT model inside disable_adapter() counts as its base model.
        forward: how it is run; its images make the pixels of what the cache lacks.
        cache_dir: a folder of caches that runs may share; or one cache, which must then belong to these tokens, this
            model, dtype and version. None stores nothing.
        ld_alpha: weights the sums as LD-DPO does; the columns are then of this ld_alpha alone.
        description: label of a progress bar, which starts at the rows that were found; None shows none.
        ranks: each computes its share of the windows that no process finds in the cache, and gets the sums of the
            others from their processes. Where forwards of the model are collectives, forward.lockstep is needed.
        window: rows computed and stored together.

    Raises:
        ValueError: cache_dir is a cache of something else, lists that are not stored best first, ld_alpha with lists or
            weights of tokens, or the errors of images in response_logps.
    """
    ranks = ranks or Ranks.alone()
    check_ld_alpha(ld_alpha, is_list=has_lists(dataset.column_names), weighted=False)
    _check_best_first(dataset)
    fingerprints = ResponseFingerprints.of(dataset)
    store = None if cache_dir is None else ReferenceStore(cache_dir, _identity(fingerprints, model, forward))
    order = prompt_order(dataset)
    ordered = dataset.select(order)
    counts = np.diff(fingerprints.bounds)
    zeros = torch.zeros(len(dataset), int(counts.max(initial=2)))
    columns = _Columns(ordered, zeros, store, ld_alpha, writes=ranks.is_first_of_group)
    parts = chunk_bounds(len(dataset), window)
    missing = set(columns.read(parts))
    # Machines without a common folder may find different windows: what any process has is not computed.
    nowhere = missing.intersection(*ranks.everyone.all_gather(missing))
    mine = sorted(nowhere)[ranks.rank :: ranks.size]
    runs = [Run(model)]
    with contextlib.ExitStack() as stack:
        if forward.lockstep is not None:
            stack.enter_context(eval_mode(model))
            stack.enter_context(
                forward.lockstep.until_all_are_done(model, lambda batch: run_batch(batch, runs, forward))
            )
        columns.compute(mine, model, forward, description)
    columns.exchange(parts, {*parts}.difference(missing).union(mine), ranks.everyone)
    sums = torch.empty_like(columns.sums)
    sums[torch.from_numpy(order)] = columns.sums
    member = torch.arange(sums.shape[1]) < torch.from_numpy(counts)[:, None]
    of_responses = sums[member].numpy()
    if ld_alpha is None:  # else a response's sum depends on the other response of its pair
        of_responses = of_responses[fingerprints.first_equal()]
    names = reference_columns(dataset.column_names)
    if fingerprints.lists:
        values = pa.ListArray.from_arrays(pa.array(fingerprints.bounds, pa.int32()), of_responses)
        return dataset.add_column(names[0], values)
    for name, column in zip(names, of_responses.reshape(-1, 2).T, strict=True):
        dataset = dataset.add_column(name, column)
    return dataset


def _check_best_first(dataset: Dataset) -> None:
    """Raise ValueError unless the rows are pairs, or lists whose ranks never fall: `pack` reads lists in that order."""
    if not has_lists(dataset.column_names):
        return
    way = "tokenize_preferences puts lists in order"
    if RANK_COLUMN not in dataset.column_names:
        raise ValueError(f"{RANK_COLUMN}: expected beside responses_ids, and there is no such column: {way}")
    bounds = chunk_bounds(len(dataset), _ROWS)
    for (start, _), table in zip(bounds, read_chunks(dataset, [RANK_COLUMN], bounds), strict=True):
        for row, ranking in enumerate(table.column(RANK_COLUMN).to_pylist(), start):
            if ranking is None or any(one > other for one, other in pairwise(ranking)):
                raise ValueError(f"row {row}: {RANK_COLUMN}: expected the best response first, got {ranking}: {way}")


@dataclass
class _Columns:
    """The columns while they are filled, from the store or by the model. Rows are numbered in the order of prompts.

    Attributes:
        ordered: the rows.
        sums: (n, K) float32, nats: of chosen and rejected response of every row, or of its list, filled with 0.
        store: None without a cache, and after a write has failed.
        ld_alpha: weights the sums.
        writes: whether this process stores what it computes; one of those that compute the same rows does.
    """

    ordered: Dataset
    sums: Tensor
    store: ReferenceStore | None
    ld_alpha: float | None
    writes: bool = True

    def read(self, parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Fill in the rows that the store has. Returns the (start, stop) of those that it lacks."""
        if self.store is None:
            return parts
        missing = []
        for start, stop in parts:
            found = self.store.read(start, stop)
            if found is None:
                missing.append((start, stop))
            else:
                self._fill(start, stop, found)
        return missing

    def _fill(self, start: int, stop: int, found: ResponseLogps) -> None:
        weights = None
        if names := weight_columns(self.ordered.column_names):
            columns = (*token_columns(self.ordered.column_names), *names)
            (table,) = read_chunks(self.ordered, columns, [(start, stop)])
            given = RowTokens.of(table).weights()
            weights = None if given is None else torch.from_numpy(given)
        sums = found.sums(self.ld_alpha, weights)
        self.sums[start:stop, : sums.shape[1]] = sums

    def compute(self, parts: list[tuple[int, int]], model: Any, forward: Forward, description: str | None) -> None:
        """Run the model on these rows, fill them in and store them."""
        ordered, names = self.ordered, self.ordered.column_names
        read = (*token_columns(names), *((RANK_COLUMN,) if has_lists(names) else ()), *stored_images(names))
        chunks: Iterator[Any] = read_chunks(ordered, read, parts)
        if IMAGES in read:
            chunks = (rows_with_images(ordered, read, *part) for part in parts)
        done = len(ordered) - sum(stop - start for start, stop in parts)
        with tqdm(
            total=len(ordered), initial=done, desc=description, disable=description is None or not parts, leave=False
        ) as bar:
            for (start, stop), examples in zip(parts, chunks, strict=True):
                computed = response_logps(examples, model, forward)
                self._fill(start, stop, computed)
                self._store(start, stop, computed)
                bar.update(stop - start)

    def exchange(self, parts: list[tuple[int, int]], known: set[tuple[int, int]], ranks: Ranks) -> None:
        """Get the sums of the rows that this process lacks from the first one that knows them. A collective."""
        everyone = ranks.all_gather(known)
        wanted = [part for part in parts if any(part not in theirs for theirs in everyone)]
        givers = {part: next(rank for rank, theirs in enumerate(everyone) if part in theirs) for part in wanted}
        own = {part: self.sums[slice(*part)] for part, giver in givers.items() if giver == ranks.rank}
        for given in ranks.all_gather(own):
            for part, sums in given.items():
                self.sums[slice(*part)] = sums

    def _store(self, start: int, stop: int, computed: ResponseLogps) -> None:
        if self.store is None or not self.writes:
            return
        try:
            self.store.write(start, stop, computed)
        except OSError as error:
            warnings.warn(
                f"reference log-probs cannot be stored in {self.store.folder} ({error.strerror or error}): they stay "
                "in memory, and this run goes on; another one will compute again what is not stored",
                stacklevel=2,
            )
            self.store = None


def _identity(fingerprints: ResponseFingerprints, model: Any, forward: Forward) -> Identity:
    device = forward.device.type
    with forward.autocast():
        autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "off"
    rows = "padded" if runs_padded(model) else "packed"
    products = f", float32 products {torch.backends.cuda.matmul.fp32_precision}" if device == "cuda" else ""
    return Identity(
        tokens=fingerprints.digest(),
        model=model_fingerprint(model, forward.gathered_dtype),
        dtype=f"{forward.gathered_dtype or model.dtype} on {device}, autocast {autocast}, {rows} rows{products}",
        version=f"engine {ENGINE_VERSION}, dpofast {__version__}",
    )
