"""Steps from training data that is streamed: read, tokenized and cut into steps as they come, in the stream's order.

Every rank reads the whole stream, so that all agree on the pairs of a step, and keeps its share of each. A resumed run
reads what it has trained on once more, and leaves it out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset

from dpofast.common.ranks import Ranks
from dpofast.training.data.tokens import PreferenceData
from dpofast.training.sampler import PairLengths, StepExamples, StepLoader, as_it_is, rank_shares

_ROWS = 256  # tokenized at a time, at least


class StepStream(torch.utils.data.IterableDataset[Any]):
    """This rank's StepExamples of every step of a stream.

    Args:
        dataset: the stream, of preference pairs in any format.
        data: tokenizes it. The report on the rows so far comes with every step: reading may be ahead of training.
        pairs_per_step: on all ranks together.
        ranks: the processes that share a step.
        drop_last: leave out a last step that is not full.
    """

    def __init__(
        self, dataset: IterableDataset, data: PreferenceData, pairs_per_step: int, ranks: Ranks, *, drop_last: bool
    ) -> None:
        """Read nothing yet."""
        self.dataset, self.pairs_per_step = dataset, pairs_per_step
        self.data = copy.copy(data)
        self.data.reports = {}
        self.ranks, self.drop_last = ranks, drop_last

    def set_epoch(self, epoch: int) -> None:
        """The next iteration gives this epoch's order, where the stream is shuffled."""
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[StepExamples]:
        """Yields a step after the other."""
        waiting: list[dict[str, Any]] = []
        for examples in self._examples():
            waiting += examples
            while len(waiting) >= self.pairs_per_step:
                yield self._step(waiting[: self.pairs_per_step])
                waiting = waiting[self.pairs_per_step :]
        if waiting and not self.drop_last:
            yield self._step(waiting)

    def _examples(self) -> Iterator[list[dict[str, Any]]]:
        rows, first, self._report = iter(self.dataset), 0, None
        while part := list(islice(rows, max(_ROWS, self.pairs_per_step))):
            chunk = Dataset.from_list(part, features=self.dataset.features)
            tokens = self.data.tokenized(chunk, "train", first_row=first)
            self._report = _added(self._report, self.data.reports["train"])
            yield [{**example, "row": example["row"] + first} for example in tokens.with_format("numpy")]
            first += len(part)

    def _step(self, examples: list[dict[str, Any]]) -> StepExamples:
        # Token weights that are made of turns are a column only of those chunks that have such turns.
        columns = dict.fromkeys(name for example in examples for name in example)
        examples = [{**columns, **example} for example in examples]
        chosen = sum(len(example["chosen_ids"]) for example in examples)
        own = np.arange(len(examples))
        if self.ranks.size > 1:
            lengths = PairLengths.of(Dataset.from_list(examples))
            own = rank_shares(lengths, own, self.ranks.size)[self.ranks.rank]
        share = StepExamples(examples[index] for index in own)
        share.num_pairs, share.num_chosen_tokens, share.report = len(examples), chosen, self._report
        return share


def stream_loader(
    dataset: IterableDataset, data: PreferenceData, pairs_per_rank: int, ranks: Ranks, *, drop_last: bool
) -> StepLoader:
    """Returns a loader of this rank's share of each step of pairs_per_rank · ranks.size pairs; it has no length."""
    steps = StepStream(dataset, data, pairs_per_rank * ranks.size, ranks, drop_last=drop_last)
    return StepLoader(steps, batch_size=None, collate_fn=as_it_is)


def _added(former: Any, report: Any) -> Any:
    """A DataReport over the rows of two."""
    if former is None:
        return report
    counts = [f.name for f in fields(report) if isinstance(getattr(report, f.name), int)]
    skipped = dict(former.skipped)
    for reason, found in report.skipped.items():
        known = skipped.get(reason)
        skipped[reason] = found if known is None else known._replace(total=known.total + found.total)
    return replace(former, skipped=skipped, **{n: getattr(former, n) + getattr(report, n) for n in counts})
