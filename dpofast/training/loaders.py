"""The loaders of a DPOTrainer: this rank's share of each step, packed in the background one step ahead."""

from __future__ import annotations

from itertools import islice
from typing import Any

from datasets import Dataset, IterableDataset

from dpofast.common.ranks import Ranks
from dpofast.scoring.ahead import Ahead
from dpofast.training.data.micro_batches import StepPacker
from dpofast.training.data.stream import stream_loader
from dpofast.training.data.tokens import PreferenceData
from dpofast.training.parallel.early import ShardedEarly
from dpofast.training.parallel.work import AttentionWork
from dpofast.training.sampler import StepExamples, StepLoader, step_loader


class StepLoaders(ShardedEarly):
    """A CheckpointedTrainer whose loaders give steps.

    Attributes:
        data_ranks: what a step's pairs are divided among.
        max_tokens: packed positions per micro-batch.
    """

    train_dataset: Any
    eval_dataset: Any
    data_ranks: Ranks
    model: Any
    max_tokens: Any
    _train_batch_size: int
    _data: PreferenceData
    _training_packer: StepPacker
    _ahead: Ahead[StepExamples] | None = None

    def get_train_dataloader(self) -> StepLoader:
        """This rank's share of every step."""
        if self.train_dataset is None:
            raise ValueError("train_dataset: expected preference pairs to train on, got None")
        if isinstance(self.train_dataset, IterableDataset):
            size, drop_last = self._train_batch_size, self.args.dataloader_drop_last
            attention = AttentionWork.of(self.model.config)
            return stream_loader(
                self.train_dataset, self._data, size, self.data_ranks, drop_last=drop_last, attention=attention
            )
        return self._loader(self.train_dataset, self._train_batch_size, training=True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> StepLoader:
        """This rank's share of every evaluation batch."""
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        return self._loader(dataset, self.args.eval_batch_size, training=False)

    def get_total_train_batch_size(self, args: Any) -> int:
        """Pairs of a step: processes that share their pairs count once."""
        return self._train_batch_size * args.gradient_accumulation_steps * self.data_ranks.size

    def _loader(self, dataset: Dataset, pairs_per_rank: int, *, training: bool) -> StepLoader:
        return step_loader(
            dataset,
            pairs_per_rank,
            self.data_ranks,
            self.args,
            training=training,
            images=self._data.images,
            attention=AttentionWork.of(self.model.config),
        )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[StepExamples], None]:
        """The next step's examples, fetched and packed while the step before it ran."""
        if self._ahead is None:
            self._ahead = self._training_packer.ahead(epoch_iterator, lambda: self.max_tokens)
        return list(islice(self._ahead, num_batches)), None

    def _run_epoch(self, **arguments: Any) -> None:
        try:
            super()._run_epoch(**arguments)
        finally:
            if self._ahead is not None:
                self._ahead.close()
                self._ahead = None
