"""Choose the pairs of every optimizer step, equal on all ranks, and divide each step evenly among the ranks.

The order is that of transformers' Trainer (accelerate's seeded random sampler, or the dataset's own), cut into steps of
a fixed number of pairs whatever the number of ranks. It is a function of seed and epoch alone, so a resumed run needs
no sampler state. Where Trainer repeats pairs so that every rank gets as many, here the last step has fewer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch.utils.data import BatchSampler, DataLoader
from transformers import TrainingArguments

from dpofast.checkpointing.signals import outlive_signals
from dpofast.common.ranks import Ranks
from dpofast.data.arrow import chunk_bounds, read_chunks
from dpofast.data.images.prompt_images import PromptImages
from dpofast.data.lists import with_best_and_worst
from dpofast.data.report import DataReport
from dpofast.data.token_rows import (
    RowTokens,
    as_numpy,
    best_weight,
    image_columns,
    responses_of,
    token_columns,
    weight_columns,
    without_reference,
)
from dpofast.packing.batch import PackedBatch
from dpofast.packing.pack import pack
from dpofast.packing.planner import plan
from dpofast.training.data.media import with_media
from dpofast.training.parallel.work import NO_ATTENTION, AttentionWork

SAMPLING_STRATEGIES = ("random", "sequential")
_ROWS = 1024  # of an Arrow table at a time
_MOST_WORK = 2**30  # of a step; the planner's sums are int32


class PackedShare(NamedTuple):
    """The micro-batches of a step's examples on the CPU, and the max_tokens that they were packed for."""

    batches: list[PackedBatch]
    max_tokens: int | None


class StepExamples(list[Any]):
    """This rank's examples of a step, and counts over the whole step.

    Attributes:
        num_pairs: pairs, or lists, of the step, on all ranks.
        num_chosen_tokens: tokens of their chosen (of lists: best) responses; with token weights the sum of these.
        packed: set where they were packed ahead.
        problem: why the images of a row cannot be used, to be raised when the step is packed: an error in a loader's
            worker would come with its traceback.
        report: of a stream, the DataReport on all rows up to this step.
    """

    num_pairs: int
    num_chosen_tokens: float
    packed: PackedShare | None = None
    problem: str | None = None
    report: DataReport | None = None

    def make_media(self, images: PromptImages | None) -> None:
        """Put pixels in the place of encoded images; what is wrong with one becomes the problem."""
        try:
            with_media(self, images)
        except ValueError as error:
            self.problem = str(error)


@dataclass(frozen=True)
class PairLengths:
    """Lengths of n pairs or lists, from which a step is divided.

    Attributes:
        positions: (n,) int64, packed positions of each by itself, P + (C − 1) + (R − 1), of lists P + Σ (response − 1):
            those that its responses begin with alike are counted more than once.
        prompts: (n,) int64, prompt tokens of each.
        responses: (n,) int64, how many responses each has.
        chosen: (n,) tokens of each one's chosen (of lists: best) response, int64; with token weights, the sums of
            these, float64.
        prompt_keys: (n,) uint64, equal where the prompts are, with their images.
        work: (n,) float64, what the positions cost to compute, in units of one without its attention.
        prompt_work: (n,) float64, what those of the prompt do.
    """

    positions: np.ndarray
    prompts: np.ndarray
    responses: np.ndarray
    chosen: np.ndarray
    prompt_keys: np.ndarray
    work: np.ndarray
    prompt_work: np.ndarray

    @classmethod
    def of(cls, dataset: Dataset, attention: AttentionWork = NO_ATTENTION) -> PairLengths:
        """Reads them from a token-level dataset, 1024 rows at a time.

        Args:
            dataset: pairs or lists.
            attention: what attention costs; by default nothing, and work is positions.
        """
        columns = dataset.column_names
        names = (*token_columns(columns), *image_columns(columns), *weight_columns(columns))
        tables = read_chunks(dataset, names, chunk_bounds(len(dataset), _ROWS))
        return cls.joined(_lengths(table, attention) for table in tables)

    @classmethod
    def joined(cls, parts: Iterable[PairLengths]) -> PairLengths:
        """Those of several datasets, one behind the other."""
        nothing = np.empty(0, np.int64)
        numbers = nothing.astype(np.float64)
        none = cls(nothing, nothing, nothing, nothing, nothing.astype(np.uint64), numbers, numbers)
        columns = zip(*(each.columns() for each in [none, *parts]), strict=True)
        return cls(*(np.concatenate(values) for values in columns))

    def of_rows(self, index: slice | np.ndarray) -> PairLengths:
        """Those of some rows."""
        return PairLengths(*(values[index] for values in self.columns()))

    def columns(self) -> list[np.ndarray]:
        """The attributes, in their order."""
        return [getattr(self, field.name) for field in fields(self)]


def _lengths(table: pa.Table, attention: AttentionWork) -> PairLengths:
    rows = RowTokens.of(table)
    tokens, bounds = rows.prompts
    prompts, lengths, first = np.diff(bounds), rows.lengths, rows.bounds[:-1]
    positions = prompts + np.add.reduceat(lengths - 1, first)
    chosen = lengths[first]
    if (weights := rows.weights()) is not None:
        starts = (np.cumsum(lengths) - lengths)[first]
        parts = (weights[start:end] for start, end in zip(starts, starts + chosen, strict=True))
        chosen = np.array([np.sum(part, dtype=np.float64) for part in parts])
    responses = np.diff(rows.bounds)
    of_prompts = attention.of_lengths(prompts)
    beyond = attention.of_lengths(np.repeat(prompts, responses) + lengths - 1) - np.repeat(of_prompts, responses)
    prompt_work = prompts + of_prompts
    work = prompt_work + (positions - prompts) + np.add.reduceat(beyond, first)
    return PairLengths(positions, prompts, responses, chosen, _keys(tokens, bounds), work, prompt_work)


def rank_shares(lengths: PairLengths, step: np.ndarray, num_ranks: int) -> list[np.ndarray]:
    """Divide a step's pairs so that every rank has about as much work; pairs of one prompt stay together.

    Work is counted as if different prompts shared nothing. What they do share, a rank computes once for its own
    pairs, so with long system prompts ranks are balanced less evenly.

    Args:
        lengths: of the whole dataset.
        step: (k,) indices of the step's pairs.
        num_ranks: how many shares to make; some are empty where there are fewer prompts than ranks.

    Returns:
        The indices of every rank's pairs, in the step's order.
    """
    if num_ranks == 1:
        return [step]
    _, first, group = np.unique(lengths.prompt_keys[step], return_index=True, return_inverse=True)
    once = lengths.prompt_work[step]
    work = np.bincount(group, lengths.work[step] - once) + once[first]
    work *= min(1.0, _MOST_WORK / work.sum())
    shares = plan(np.rint(work).astype(np.int64).clip(1), num_ranks=num_ranks)
    owner = np.empty(len(first), np.int64)
    for rank in range(num_ranks):
        for groups in shares.of_rank(rank):
            owner[groups] = rank
    return [step[owner[group] == rank] for rank in range(num_ranks)]


class StepSampler(BatchSampler):
    """A DataLoader's batch_sampler: this rank's indices of every step.

    Args:
        count: pairs in the dataset.
        pairs_per_step: on all ranks together.
        strategy: "random" or "sequential".
        seed: of the random order.
        drop_last: leave out a last step that is not full.
        lengths: needed with several ranks.
        rank: this process's number.
        num_ranks: how many there are.
    """

    def __init__(
        self,
        count: int,
        pairs_per_step: int,
        *,
        strategy: str = "random",
        seed: int = 0,
        drop_last: bool = False,
        lengths: PairLengths | None = None,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        """Start at epoch 0."""
        self.count, self.pairs_per_step, self.drop_last = count, pairs_per_step, drop_last
        self.strategy, self.seed, self.epoch = strategy, seed, 0
        self.lengths, self.rank, self.num_ranks = lengths, rank, num_ranks
        self.batch_size = pairs_per_step  # what Trainer and accelerate read

    def set_epoch(self, epoch: int) -> None:
        """The next iteration gives this epoch's order."""
        self.epoch = epoch

    def steps(self) -> Iterator[np.ndarray]:
        """The indices of every step of the epoch, on all ranks together."""
        order = np.arange(self.count)
        if self.strategy == "random":
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.count, generator=generator).numpy()
        for start in range(0, len(self) * self.pairs_per_step, self.pairs_per_step):
            yield order[start : start + self.pairs_per_step]

    def __iter__(self) -> Iterator[Any]:
        """Yields what StepDataset takes: the indices of this rank's share, with those of the whole step."""
        for step in self.steps():
            share = step if self.lengths is None else rank_shares(self.lengths, step, self.num_ranks)[self.rank]
            yield _Share(share.tolist(), step)

    def __len__(self) -> int:
        """Steps in an epoch."""
        whole, rest = divmod(self.count, self.pairs_per_step)
        return whole + (rest > 0 and not self.drop_last)


class _Share(list[int]):
    """The indices of a rank's share of a step."""

    def __init__(self, indices: list[int], step: np.ndarray) -> None:
        super().__init__(indices)
        self.step = step


class StepDataset(torch.utils.data.Dataset[Any]):
    """A token-level dataset that returns a rank's examples of a step as StepExamples."""

    def __init__(
        self, dataset: Dataset, lengths: PairLengths | None = None, images: PromptImages | None = None
    ) -> None:
        """Keep them; lengths are needed where a rank's share is not the whole step, images for rows that have some."""
        self.dataset, self.lengths, self.images = as_numpy(dataset), lengths, images

    def __len__(self) -> int:
        """Pairs."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """One example."""
        examples = [with_best_and_worst(self.dataset[index])]
        with_media(examples, self.images)
        return examples[0]

    def __getitems__(self, share: _Share) -> StepExamples:
        """A rank's examples of a step, each with its index in the dataset; lists also have chosen_ids, rejected_ids."""
        columns = self.dataset[list(share)]
        rows = zip(share, *columns.values(), strict=True)
        examples = StepExamples(
            with_best_and_worst({**dict(zip(columns, row, strict=True)), "index": index}) for index, *row in rows
        )
        examples.num_pairs = len(share.step)
        if self.lengths is None:
            examples.num_chosen_tokens = sum(map(best_weight, examples))
        else:
            examples.num_chosen_tokens = self.lengths.chosen[share.step].sum().item()
        examples.make_media(self.images)
        return examples


class StepLoader(DataLoader[Any]):
    """A DataLoader over steps. Trainer calls set_epoch on a loader, and torch's has none."""

    def set_epoch(self, epoch: int) -> None:
        """Pass it to the sampler, or to the dataset of a stream."""
        (self.batch_sampler or self.dataset).set_epoch(epoch)  # type: ignore[union-attr]


def step_loader(
    dataset: Dataset,
    pairs_per_rank: int,
    ranks: Ranks,
    args: TrainingArguments,
    *,
    training: bool,
    images: PromptImages | None = None,
    attention: AttentionWork = NO_ATTENTION,
) -> StepLoader:
    """Returns a loader of StepExamples: this rank's share of each step of pairs_per_rank · ranks.size pairs.

    In training in the order and with the dataloader_drop_last of args, in evaluation all pairs in the dataset's order.
    images makes the pixels of rows with images; by what attention costs, ranks have about as much work.
    """
    lengths = PairLengths.of(dataset, attention) if ranks.size > 1 else None
    sampler = StepSampler(
        len(dataset),
        pairs_per_rank * ranks.size,
        strategy=args.train_sampling_strategy if training else "sequential",
        seed=args.seed if args.data_seed is None else args.data_seed,
        drop_last=training and args.dataloader_drop_last,
        lengths=lengths,
        rank=ranks.rank,
        num_ranks=ranks.size,
    )
    return StepLoader(
        StepDataset(dataset, lengths, images),
        batch_sampler=sampler,
        collate_fn=as_it_is,
        num_workers=args.dataloader_num_workers,
        worker_init_fn=outlive_signals,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        # not every supported transformers has it
        multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None),
    )


def first_examples(dataset: Dataset, positions: int, share: str, images: PromptImages | None = None) -> StepExamples:
    """Returns the first pairs that fill at least so many positions of one micro-batch, as a step of their own.

    Args:
        dataset: token-level pairs or lists; all of them where they fill fewer.
        positions: packed positions.
        share: as in `pack`.
        images: makes the pixels of rows with images.
    """
    examples, tokens, enough = StepExamples(), 0, float(positions)
    for example in as_numpy(dataset):
        row = [with_best_and_worst(example)]
        with_media(row, images)
        examples += row
        responses = responses_of(example)
        tokens += len(example["prompt_ids"]) * (len(responses) if share == "none" else 1) + sum(map(len, responses))
        if tokens >= enough:
            packed = pack([without_reference(row) for row in examples], share=share)[0].num_tokens
            if packed >= positions:
                break
            enough = tokens * positions / packed  # if the next ones share as much
    examples.num_pairs = examples.num_chosen_tokens = len(examples)
    return examples


def as_it_is(step: Any) -> Any:
    """A collate_fn that worker processes can be sent."""
    return step


def _keys(tokens: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """(rows,) uint64, a hash of every row's tokens that is equal in all processes, unlike Python's own."""
    ends = bounds.tolist()
    digests = [
        hashlib.blake2b(tokens[start:stop].tobytes(), digest_size=8).digest()
        for start, stop in zip(ends[:-1], ends[1:], strict=True)
    ]
    return np.frombuffer(b"".join(digests), np.uint64)
