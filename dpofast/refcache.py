"""Reference log-probs, computed once before training and kept as columns of the dataset.

A reference that never moves has the same log-probs in every epoch, so no second model stays in memory and no reference
forward stands in a training step. They come through the very path that the policy takes (the same packing, head and
dtype), which is what makes the margin 0 at step 0.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from dpofast.formats import REF_COLUMNS
from dpofast.model import sequence_logprobs
from dpofast.packing import PackedBatch, pack
from dpofast.pair_terms import pair_logprobs
from dpofast.preference import of_pairs

# Examples planned together: enough for full micro-batches, few enough to stay in memory for any dataset.
_WINDOW = 256


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
    *,
    max_tokens: int,
    share_prompts: bool,
    max_logits_bytes: int | None,
    ld_alpha: float | None = None,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
    progress: Callable[[int], Any],
) -> Dataset:
    """Add ref_chosen_logps and ref_rejected_logps (float32, nats, summed over the response) to a token-level dataset.

    With ld_alpha the sums are weighted by it, as TRL's are: they belong to that ld_alpha.

    progress is called with the number of examples done after every window.
    """
    columns = torch.empty(2, len(dataset), dtype=torch.float32)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(dataset), _WINDOW):
            stop = min(start + _WINDOW, len(dataset))
            examples = [dataset[i] for i in range(start, stop)]
            for batch in pack(examples, max_tokens, share_prompts=share_prompts):
                with autocast():
                    logps = reference_logps(model, batch.to(device), max_logits_bytes, ld_alpha).cpu()
                columns[:, start + batch.pair_examples] = of_pairs(logps, batch.pairs).T
            progress(stop - start)
    finally:
        model.train(was_training)
    for name, column in zip(REF_COLUMNS, columns, strict=True):
        dataset = dataset.add_column(name, column.numpy())
    return dataset
