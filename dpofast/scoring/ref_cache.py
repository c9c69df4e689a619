"""Reference log-probs, computed once, kept on disk, and handed on as columns of the dataset.

A reference that never moves has the same log-probs in every epoch and in every run over the same data, whatever its
beta or loss: no second model stays in memory, no reference forward stands in a training step, and a sweep computes them
once. They come through the very path that the policy takes (the same packing, head and dtype), which is what makes the
margin 0 at step 0. Every token's is kept, so that a changed ld_alpha is another sum and no other computation.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from dpofast._version import __version__
from dpofast.common.ranks import Ranks
from dpofast.data.arrow import chunk_bounds, read_chunks
from dpofast.data.formats import ID_COLUMNS, REF_COLUMNS
from dpofast.losses.sequences import pair_logprobs
from dpofast.model.attach import base_causal_lm, sequence_logprobs
from dpofast.packing.pack import PackedBatch
from dpofast.scoring.fingerprints import branch_checksums, first_equal, model_checksum
from dpofast.scoring.ref_store import Identity, ReferenceStore
from dpofast.scoring.score import WINDOW, Forward, ResponseLogps, response_logps

# To be raised whenever log-probs may come out differently than before: kernels, attention, numerics of the head.
ENGINE_VERSION = 1

# The folder inside output_dir where caches lie unless ref_cache_dir says otherwise.
CACHE_FOLDER = "reference"


@torch.no_grad()
def reference_logps(
    model: Any, batch: PackedBatch, max_logits_bytes: int | None, ld_alpha: float | None = None
) -> Tensor:
    """Sequence log-probs (S,) float32 of a batch that lies on the model's device; with ld_alpha weighted, (P, 2)."""
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

    What the cache holds is read, what it lacks is computed and stored, a window of rows at a time. 40 bytes a row stay
    in memory, while it runs, and 8 afterwards. Equal responses to equal prompts get one number, wherever they stand.

    A cache that cannot be written (a full disk, a folder that is read-only) costs a warning and no result: what was
    computed is in memory, the run goes on, and another one has to compute again what could not be stored.

    Args:
        dataset: prompt_ids, chosen_ids, rejected_ids.
        model: the reference with its log-prob head; a PEFT model inside disable_adapter() counts as its base model.
        forward: how it is run.
        cache_dir: a folder that may be shared by runs; or one cache, which must then belong to these tokens, this
            model, dtype and version. None stores nothing.
        ld_alpha: weights the sums, as TRL's are: they belong to that ld_alpha.
        description: of a progress bar, which starts at the rows that were found; None shows none.
        ranks: each process computes its share of the windows, and all read those of the others; windows that are not
            to be found then (machines without a common folder) are computed by every process that lacks them. So the
            model's forward must be no collective: whole in each process, not sharded yet.
        window: rows computed and stored together.

    Raises:
        ValueError: cache_dir is a cache of something else.
    """
    ranks = ranks or Ranks.alone()
    checksums = branch_checksums(dataset)
    store = None if cache_dir is None else ReferenceStore(cache_dir, _identity(checksums, model, forward))
    columns = _Columns(torch.empty(len(dataset), 2, dtype=torch.float32), store, ld_alpha)
    parts = chunk_bounds(len(dataset), window)
    missing = set(columns.read(parts))
    # By their place among all windows: what is missing may look different to a rank that comes later.
    mine = parts[ranks.rank :: ranks.size]
    columns.compute([part for part in mine if part in missing], dataset, model, forward, description)
    if ranks.size > 1:
        ranks.barrier()
        others = sorted(missing.difference(mine))
        columns.compute(columns.read(others), dataset, model, forward, description)
    sums = columns.sums
    if ld_alpha is None:  # else a response's number depends on the other one of its pair
        sums = sums.view(-1)[torch.from_numpy(first_equal(checksums.reshape(-1, 2)))].view(-1, 2)
    for name, column in zip(REF_COLUMNS, sums.T, strict=True):
        dataset = dataset.add_column(name, column.numpy())
    return dataset


@dataclass
class _Columns:
    """sums (n, 2), filled from the store, or by the model and then stored, while there is a store."""

    sums: Tensor
    store: ReferenceStore | None
    ld_alpha: float | None

    def read(self, parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Fill in what the store has; returns what it lacks."""
        if self.store is None:
            return parts
        self.store.refresh()
        return [part for part in parts if not self._fill(part, self.store.read(*part))]

    def _fill(self, part: tuple[int, int], found: ResponseLogps | None) -> bool:
        if found is not None:
            self.sums[slice(*part)] = found.sums(self.ld_alpha)
        return found is not None

    def compute(
        self, parts: list[tuple[int, int]], dataset: Dataset, model: Any, forward: Forward, description: str | None
    ) -> None:
        """Fill in the rest."""
        done = len(dataset) - sum(stop - start for start, stop in parts)
        with tqdm(
            total=len(dataset), initial=done, desc=description, disable=description is None or not parts, leave=False
        ) as bar:
            for part, table in zip(parts, read_chunks(dataset, ID_COLUMNS, parts), strict=True):
                computed = response_logps(table, model, forward)
                self._fill(part, computed)
                self._store(part, computed)
                bar.update(part[1] - part[0])

    def _store(self, part: tuple[int, int], computed: ResponseLogps) -> None:
        if self.store is None:
            return
        try:
            self.store.write(*part, computed)
        except OSError as error:
            warnings.warn(
                f"reference log-probs cannot be stored in {self.store.folder} ({error.strerror or error}): they stay "
                "in memory, and this run goes on; another one will compute again what is not stored",
                stacklevel=2,
            )
            self.store = None


def _identity(checksums: np.ndarray, model: Any, forward: Forward) -> Identity:
    device = forward.device.type
    with forward.autocast():
        autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "off"
    rows = "padded" if base_causal_lm(model)._padded_rows else "packed"
    products = f", float32 products {torch.backends.cuda.matmul.fp32_precision}" if device == "cuda" else ""
    return Identity(
        tokens=hashlib.blake2b(checksums.tobytes(), digest_size=32).hexdigest(),
        model=model_checksum(model),
        dtype=f"{model.dtype} on {device}, autocast {autocast}, {rows} rows{products}",
        version=f"engine {ENGINE_VERSION}, dpofast {__version__}",
    )
