"""The evaluation loop: losses and metrics over a dataset without gradients, on one process or on several."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from dpofast.common.ranks import Ranks
from dpofast.evaluation.metrics import MetricSums
from dpofast.evaluation.pair_records import PairRecords
from dpofast.evaluation.statistics import length_statistics
from dpofast.training.data.media import without_media
from dpofast.training.sampler import StepExamples
from dpofast.training.step import OptimizerStep


@dataclass(frozen=True)
class Evaluation:
    """metrics: means over all pairs, by name without a prefix; records: what is kept of each pair; num_pairs."""

    metrics: dict[str, float]
    records: PairRecords
    num_pairs: int


@torch.no_grad()
def evaluate_pairs(
    batches: Iterable[StepExamples],
    step_of: Callable[[StepExamples, MetricSums], OptimizerStep],
    ranks: Ranks,
    after_each: Callable[[], None],
) -> Evaluation:
    """Loss and metrics of preference pairs. A collective; the result is the same on all ranks.

    Args:
        batches: this rank's examples of each evaluation batch.
        step_of: packs them for a model in evaluation mode; its metrics are added to the given sums.
        ranks: the processes that share every batch.
        after_each: called after each batch.
    """
    sums, records, num_pairs = MetricSums(), PairRecords(), 0
    for examples in batches:
        step = step_of(examples, sums)
        step.count_routing()
        kept = without_media(examples)
        for batch, share in zip(step.batches, step.shares(), strict=True):
            output = step.forward(batch, share)
            count = len(output.losses)
            sums.add("loss", output.losses.sum(), count)
            if output.aux_loss is not None:
                sums.add("loss", step.settings.balancing * output.aux_loss * examples.num_pairs, 0)
            if batch is not None:
                records.add(kept, batch, output)
        num_pairs += examples.num_pairs
        after_each()
    records = records.joined(ranks)
    metrics = sums.means(ranks) | length_statistics(records.table()).metrics()
    return Evaluation(metrics, records, num_pairs)
