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
from datasets import IterableDataset

from dpofast.common.ranks import Ranks
from dpofast.data.images.stored import dataset_of, undecoded
from dpofast.data.lists import with_best_and_worst
from dpofast.data.report import NoUsableRow
from dpofast.data.token_rows import as_numpy
from dpofast.training.data.tokens import PreferenceData
from dpofast.training.parallel.work import NO_ATTENTION, AttentionWork
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
        attention: what attention costs, for ranks to have about as much work.
    """

    def __init__(
        self,
        dataset: IterableDataset,
        data: PreferenceData,
        pairs_per_step: int,
        ranks: Ranks,
        *,
        drop_last: bool,
        attention: AttentionWork = NO_ATTENTION,
    ) -> None:
        """Read nothing yet."""
        self.dataset, self.pairs_per_step = undecoded(dataset), pairs_per_step
        self.data = copy.copy(data)
        self.data.reports = {}
        self.ranks, self.drop_last, self.attention = ranks, drop_last, attention

    def set_epoch(self, epoch: int) -> None:
        """The next iteration gives this epoch's order, where the stream is shuffled."""
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[StepExamples]:
        """Yields a step after the other."""
        waiting: list[dict[str, Any]] = []
        lengths = PairLengths.joined([])
        for examples, their_lengths in self._examples():
            waiting += examples
            lengths = PairLengths.joined([lengths, their_lengths])
            while len(waiting) >= self.pairs_per_step:
                yield self._step(waiting, lengths, self.pairs_per_step)
                waiting, lengths = waiting[self.pairs_per_step :], lengths.of_rows(slice(self.pairs_per_step, None))
        if waiting and not self.drop_last:
            yield self._step(waiting, lengths, len(waiting))

    def _examples(self) -> Iterator[tuple[list[Any], PairLengths]]:
        """Yields the examples of further rows, and their lengths; rows none of which can be used count as skipped.

        Raises:
            DataError: bad rows, or no row of the whole stream that can be used.
        """
        rows, first, self._report = iter(self.dataset), 0, None
        while part := list(islice(rows, max(_ROWS, self.pairs_per_step))):
            start, first = first, first + len(part)
            chunk = dataset_of(part, self.dataset.features, start)
            try:
                tokens = self.data.tokenized(chunk, "train", first_row=start)
            except NoUsableRow as empty:
                self._report = _added(self._report, empty.report, start)
                continue
            self._report = _added(self._report, self.data.reports["train"], start)
            numbered = ({**example, "row": example["row"] + start} for example in as_numpy(tokens))
            yield [with_best_and_worst(example) for example in numbered], PairLengths.of(tokens, self.attention)
        if self._report is not None and not self._report.kept:
            raise NoUsableRow(self._report)

    def _step(self, examples: list[Any], lengths: PairLengths, count: int) -> StepExamples:
        """This rank's share of a step of the first so many examples."""
        own = np.arange(count)
        if self.ranks.size > 1:
            own = rank_shares(lengths, own, self.ranks.size)[self.ranks.rank]
        # Token weights that are made of turns are a column only of those chunks that have such turns.
        names = dict.fromkeys(name for example in examples[:count] for name in example)
        share = StepExamples({**names, **examples[index]} for index in own)
        share.num_pairs, share.num_chosen_tokens = count, lengths.chosen[:count].sum().item()
        share.report = self._report
        share.make_media(self.data.images)
        return share


def stream_loader(
    dataset: IterableDataset,
    data: PreferenceData,
    pairs_per_rank: int,
    ranks: Ranks,
    *,
    drop_last: bool,
    attention: AttentionWork = NO_ATTENTION,
) -> StepLoader:
    """Returns a loader of this rank's share of each step of pairs_per_rank · ranks.size pairs; it has no length."""
    size = pairs_per_rank * ranks.size
    steps = StepStream(dataset, data, size, ranks, drop_last=drop_last, attention=attention)
    return StepLoader(steps, batch_size=None, collate_fn=as_it_is)


def _added(former: Any, report: Any, first_row: int) -> Any:
    """A DataReport over the rows of two; the second numbers its rows from first_row on."""
    if former is None:
        return report
    counts = [f.name for f in fields(report) if isinstance(getattr(report, f.name), int)]
    skipped = dict(former.skipped)
    for reason, found in report.skipped.items():
        known = skipped.get(reason)
        found = found._replace(rows=tuple(row + first_row for row in found.rows))
        skipped[reason] = found if known is None else known.plus(found)
    return replace(former, skipped=skipped, **{n: getattr(former, n) + getattr(report, n) for n in counts})
