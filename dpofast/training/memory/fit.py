"""A step that is done again in smaller micro-batches until it fits into memory, and max_tokens="auto"."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from datasets import Dataset
from torch import nn

from dpofast.common.ranks import Ranks
from dpofast.data.images.prompt_images import PromptImages
from dpofast.losses.pairs import StepTotals
from dpofast.packing.batch import PackedBatch
from dpofast.training.data.micro_batches import StepPacker
from dpofast.training.memory.out_of_memory import (
    give_back,
    largest_auto,
    probe_max_tokens,
    random_states,
    restore_random_states,
)
from dpofast.training.sampler import StepExamples, first_examples
from dpofast.training.step import OptimizerStep, StepResult, StepSettings

_OPTIMIZER_BYTES = 8  # AdamW's two float32 moments of a parameter


def run_until_it_fits(
    attempt: Callable[[], OptimizerStep], halve: Callable[[Sequence[PackedBatch]], None], model: nn.Module
) -> tuple[list[PackedBatch], StepResult]:
    """Run a step; where memory ran out, drop the partial gradients, free CUDA's unused blocks, halve, and run it again.

    The random generators are set back, so that dropout draws what it would have drawn.

    Args:
        attempt: packs the step, for the current max_tokens.
        halve: halves max_tokens, given the micro-batches that did not fit; raises where it cannot be less.
        model: the policy, as accelerate wrapped it.

    Returns:
        This rank's micro-batches of the attempt that fitted, and its result.
    """
    draws = None
    while True:
        step = attempt()
        device = step.settings.device
        draws = random_states(device) if draws is None else draws
        result, batches = step.run(), [batch for batch in step.batches if batch is not None]
        if result is not None:
            return batches, result
        del step  # what it summed may hold on to the device's memory
        model.zero_grad(set_to_none=True)
        give_back(device)
        halve(batches)
        restore_random_states(draws, device)


def auto_max_tokens(
    model: nn.Module,
    dataset: Dataset | None,
    packer: StepPacker,
    settings: StepSettings,
    totals: Callable[[StepExamples], StepTotals],
    images: PromptImages | None = None,
) -> int:
    """What fits on every rank, measured with the first rows of the data; all that is allowed without data.

    Args:
        model: the policy, not yet wrapped.
        dataset: the training data, token ids.
        packer: how steps are packed.
        settings: of the run.
        totals: the counts of a step.
        images: makes the pixels of rows with images.
    """
    device = settings.device
    cap = largest_auto(device, 1 if settings.group is None else settings.group.size())
    if dataset is None:
        return cap
    alone = replace(settings, ranks=Ranks.alone())

    def probe(positions: int) -> int:
        """Forward and backward of a micro-batch of the first rows; returns its positions and restores all state."""
        examples = first_examples(dataset, positions, packer.share, images)
        (batch,) = packer.on_device(examples, None)
        draws = random_states(device)
        model.train()
        OptimizerStep(alone, model, [batch], totals(examples)).forward(batch).loss.backward()
        model.zero_grad(set_to_none=True)
        restore_random_states(draws, device)
        return batch.num_tokens

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fitting = probe_max_tokens(probe, device, cap, kept=_OPTIMIZER_BYTES * trained)
    return -int(settings.ranks.all_reduce_max(-fitting))
